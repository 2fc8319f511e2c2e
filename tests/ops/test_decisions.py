"""Where decisions about providers come from and go to: the disk, a checkpoint, the processes of a group."""

from __future__ import annotations

import argparse
import json
import os
import re
import warnings
from pathlib import Path

import pytest
import torch
from tuned import Races, new_process, tune

from auglocal_ext.cli import info
from auglocal_ext.ops import decisions, providers, registry, tuning

CPU = torch.device("cpu")
OP = "batch_norm_act"


@pytest.fixture(autouse=True)
def races(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Races:
    return tune(monkeypatch, tmp_path)


def chosen(x: torch.Tensor) -> str:
    """The provider that runs the op."""
    return str(registry.chosen(OP, x, None)).rpartition(".")[2]


def image(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (8, 4, 6, 6)))


def test_a_forked_process_is_of_no_group(races, monkeypatch):
    class OfTheParent:
        def compare_set(self, *_):
            os._exit(1)

    Group(monkeypatch, OfTheParent())
    child = os.fork()
    if child == 0:
        os._exit(0 if chosen(image()) == "reference" else 2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_decisions_outlive_the_process(races, tmp_path):
    chosen(image())
    (path,) = tmp_path.rglob("*.json")
    stored = json.loads(path.read_text())
    assert stored["provider"] == "reference" and stored["seconds"] == races.seconds
    new_process()
    assert chosen(image()) == "reference" and len(races) == 1
    new_process()
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert chosen(image()) == "reference" and len(races) == 2
    finally:
        torch.set_num_threads(threads)
    assert len(list(tmp_path.rglob("*.json"))) == 2


def test_info_prints_them(races, capsys):
    assert "nothing was measured yet" in info.decisions_as_text(info.decisions_here())
    chosen(image())
    run = info.run(argparse.Namespace(providers=True, json=False))
    first, line = capsys.readouterr().out.splitlines()
    assert run == 0 and first.startswith(decisions.environment(CPU)["device"])
    assert re.fullmatch(
        r"  batch_norm_act float32 contiguous 8x4x64 cpu  reference 1000\.000 ms, cpu 2000\.000 ms  "
        r"\(20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00\)",
        line,
    )
    info.run(argparse.Namespace(providers=True, json=True))
    (device,) = json.loads(capsys.readouterr().out)[:1]
    assert device["threads"] == torch.get_num_threads() and device["forms"][0]["provider"] == "reference"


def test_a_new_provider_is_measured_too(races, monkeypatch):
    monkeypatch.setattr(providers, "rivals", lambda op, device, dtype: ["cpu", "reference", "triton"])
    where = decisions.environment(CPU)
    decisions.write(decisions.Decision(tuning.form_of(OP, image()), "cpu", {"cpu": 1.0, "reference": 2.0}, ""), where)
    with pytest.warns(UserWarning, match="'triton' is left out"):
        chosen(image())
    assert len(races) == 1


@pytest.mark.parametrize("damage", ["", "[]", "{}", "nested", "foreign", "no seconds", "a list", "unreadable"])
def test_a_file_that_cannot_be_used_is_ignored_with_one_warning(races, tmp_path, damage):
    chosen(image())
    (path,) = tmp_path.rglob("*.json")
    stored = json.loads(path.read_text())
    if damage == "foreign":
        damage = json.dumps({**stored, "environment": {**stored["environment"], "device": "another"}})
    elif damage == "nested":
        damage = "[" * 99999
    elif damage == "no seconds":
        damage = json.dumps({**stored, "seconds": {"cpu": "fast"}})
    elif damage == "a list":
        damage = json.dumps({**stored, "provider": "cpu", "seconds": ["cpu"]})
    if damage == "unreadable":
        path.unlink()
        path.mkdir()
    else:
        path.write_text(damage)
    new_process()
    with pytest.warns(UserWarning, match="is ignored") as found:
        assert chosen(image()) == "reference" and len(races) == 2
        assert not [*decisions.read_all(decisions.environment(CPU))] or path.is_file()
    assert len(found) == 1


def test_without_a_place_on_disk_decisions_last_as_long_as_the_process(races, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [chosen(image()), chosen(image())] == ["reference", "reference"] and len(races) == 1


def test_a_folder_that_cannot_be_used_is_no_damaged_file(races, monkeypatch, tmp_path):
    (tmp_path / "auglocal_ext" / "providers").mkdir(parents=True)
    monkeypatch.setattr(decisions, "_cpu", lambda: "a processor of a long name" * 20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chosen(image()) == "reference" and len(races) == 1


def test_info_leaves_out_a_file_without_a_form(races, tmp_path):
    chosen(image())
    (path,) = tmp_path.rglob("*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "form": 5}))
    with pytest.warns(UserWarning, match="is ignored"):
        assert "nothing was measured yet" in info.decisions_as_text(info.decisions_here())


def test_a_full_disk_keeps_no_half_written_file(races, monkeypatch, tmp_path):
    def full(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert chosen(image()) == "reference"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_processes_of_one_number_write_beside_each_other(races, monkeypatch):
    """As those of containers that share a folder."""
    written = []
    monkeypatch.setattr(os, "replace", lambda source, target: written.append(source))
    chosen(image())
    new_process()
    chosen(image())
    assert len(set(written)) == 2


def test_a_checkpoint_decides_before_the_disk(races):
    chosen(image())
    recorded = {form: "cpu" for form in tuning.decided()}
    assert not tuning.adopt(tuning.decided())  # nothing is captured again for equal decisions
    assert tuning.adopt(recorded)
    assert chosen(image()) == "cpu" and tuning.decided() == recorded
    tuning.adopt({form: "a provider of another machine" for form in recorded})
    assert chosen(image()) == "reference"
    for damaged in ({"form": 1}, ["form"], {1: "cpu"}):
        with pytest.raises(ValueError, match="expected the provider of each form"):
            tuning.adopt(damaged)


class Group:
    """A process group of two, of which this process is one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, store) -> None:
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
        monkeypatch.setattr(tuning, "default_store", lambda: store)


def test_processes_of_a_group_share_decisions(races, monkeypatch, tmp_path):
    Group(monkeypatch, torch.distributed.HashStore())
    assert chosen(image()) == "reference"
    new_process()
    races.seconds["cpu"] = 0.1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "of another host"))
    assert chosen(image()) == "reference"
    assert not (tmp_path / "of another host").exists()  # where it was not found to be the fastest
    new_process()
    monkeypatch.setattr(providers, "rivals", lambda op, device, dtype: ["cpu", "triton"])
    with pytest.warns(UserWarning, match="left out"):
        assert chosen(image()) == "cpu"  # what the others use is not there


def test_a_group_without_a_store_has_the_fixed_order(races, monkeypatch):
    class Nowhere:
        def compare_set(self, *_):
            raise NotImplementedError

    Group(monkeypatch, Nowhere())
    assert chosen(image()) == "cpu"


def test_a_group_of_mpi_has_the_fixed_order(races, monkeypatch):
    Group(monkeypatch, None)
    assert chosen(image()) == "cpu"


def test_a_store_that_is_gone_ends_no_run(races, monkeypatch):
    class Gone:
        def compare_set(self, *_):
            raise torch.distributed.DistNetworkError("Broken pipe")

    Group(monkeypatch, Gone())
    with pytest.warns(UserWarning, match="cannot be reached .Broken pipe.; 'cpu' is used here"):
        assert chosen(image()) == "cpu"


def test_joining_a_group_keeps_only_what_a_checkpoint_has_decided(races):
    chosen(image())
    tuning.adopt({"another form": "cpu"})
    tuning.forget()
    assert tuning.decided() == {"another form": "cpu"} and not tuning.lookups

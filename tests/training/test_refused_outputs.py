"""Output folders, options and weights that cannot be are refused in one line."""

from __future__ import annotations

import os

import pytest
import torch
from runs import trainer
from texts import settings, text

from auglocal_ext.cli import main
from auglocal_ext.training import SettingsError, Trainer
from auglocal_ext.training.config.settings import SETTINGS
from auglocal_ext.training.run.run_folder import refuse_unusable
from auglocal_ext.training.run.run_lock import RunLock


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("file", "file is no folder; choose another"),
        ("file/run", "file is no folder; choose another"),
        ("n" * 300, "File name too long; choose another"),
        ("a\0b", "null"),
        ("/proc/run", "/proc"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_images_are_read(tmp_path, output, said):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=f"--output .*{said}"):
        refuse_unusable(tmp_path / output)
        with RunLock(tmp_path / output):  # some folders take no others only when they are made
            pass


def test_a_read_only_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(SettingsError, match="cannot be written: .* is read-only; choose another"):
        refuse_unusable(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--output", "~nosuch/run"], "--output ~nosuch/run: there is no user nosuch"),
        (["--recipe", "~nosuch/x"], "--recipe ~nosuch/x: neither a recipe"),
        (["--width", "1000000"], "--network resnet8 --width 1000000 cannot be made here: DefaultCPUAllocator"),
        (["--lr", "inf"], "--lr must be finite, got inf"),
        (["--weight-decay", "nan"], "--weight-decay must be finite, got nan"),
        (["--data", "~nosuch/x"], "~nosuch/x: no such folder"),
    ],
)
def test_options_that_cannot_be_are_one_line(image_folder, tmp_path, capsys, arguments, said):
    common = ["--data", str(image_folder()), "--output", str(tmp_path / "run"), "--network", "resnet8"]
    assert main(["train", *common, *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}") and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("option", "expected"), [("--seed", "a whole number from 0 to 2^64 - 1"), ("--width", "a number below 2^63")]
)
def test_numbers_beyond_64_bits_are_refused_by_the_command_line(tmp_path, capsys, option, expected):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--data", str(tmp_path), "--output", str(tmp_path / "run"), option, str(2**64)])
    first, *_ = capsys.readouterr().err.splitlines()
    assert first == f"error: argument {option}: expected {expected}, got {2**64}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"rule": "infopro", "weights": (1.0, float("nan"), 1.0, 1.0)},
        {"rule": "predsim", "beta": float("nan")},
        {"mean": (float("nan"), 1.0, 1.0)},
        {"std": (1.0, float("inf"), 1.0)},
        {"momentum": float("nan")},
        {"mixup": float("inf")},
    ],
)
def test_numbers_that_are_not_finite_are_refused(config, settings):
    (name,) = settings.keys() - {"rule"}
    with pytest.raises(SettingsError, match=f"^{SETTINGS[name].flag} must be finite"):
        config(**settings)


def test_weights_of_a_file_that_are_not_finite_are_refused(config, separable, tmp_path):
    network = trainer(config(rule="bp"), separable).network
    state = network.state_dict()
    next(iter(state.values())).view(-1)[0] = torch.nan
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(SettingsError, match="--network-weights .*weights.pt: stem.conv.weight is not finite"):
        trainer(config(rule="bp", network_weights=str(tmp_path / "weights.pt")), separable)


@pytest.mark.parametrize("output", ["train", "train/red", "test/run"])
def test_a_run_among_its_images_is_refused(config, image_folder, output):
    """Its curves would be one of them."""
    data = image_folder()
    with pytest.raises(SettingsError, match=f"--output .*{output} lies in .*, where the pictures .* read as data"):
        Trainer(config(data=str(data), output=str(data / output)))
    Trainer(config(data=str(data), output=str(data / "run")))


def test_a_run_among_its_texts_is_refused(tmp_path):
    """Its samples would be one of them."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text(text(300))
    for output in (texts, texts / "run"):
        with pytest.raises(SettingsError, match="lies in .*texts, where the samples of text .* read as data"):
            Trainer(settings(tmp_path, data=str(texts), output=str(output)))
    Trainer(settings(tmp_path, data=str(texts), output=str(texts / "run"), sample=0))
    Trainer(settings(tmp_path, data=str(texts), output=str(texts / ".runs" / "run")))
    Trainer(settings(tmp_path, data=str(texts / "a.txt"), output=str(texts / "run")))

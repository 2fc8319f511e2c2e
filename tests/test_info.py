"""``info`` tells what is there, what runs where and why something is missing; the choice of a provider agrees."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys

import pytest
import torch

from auglocal_ext.cli import info
from auglocal_ext.ops import pooled_cross_entropy, providers

OP = "pooled_cross_entropy"


@pytest.fixture
def no_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cpu", "cuda"):
        monkeypatch.setitem(providers._REASONS, name, lambda name=name: f"not built: no compiler for {name}")


def test_report_is_complete() -> None:
    found = json.loads(json.dumps(info.report()))
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["providers"]) == set(providers.NAMES)
    assert all((p["reason"] is None) == p["available"] for p in found["providers"].values())
    assert set(found["ops"]) == set(providers.TABLES) and OP in found["ops"]
    assert len(found["gpus"]) == torch.cuda.device_count()


def test_text_names_every_provider_with_its_reason(no_compiled: None) -> None:
    text = info.as_text(info.report())
    assert "missing: not built: no compiler for cpu" in text and "missing: not built: no compiler for cuda" in text
    for name in (*providers.NAMES, *providers.TABLES, torch.__version__):
        assert name in text


def test_columns_of_the_ops_stand_below_their_headings() -> None:
    found = info.report()
    found["ops"]["an_op_whose_name_is_longer_than_all_others"] = {"cpu": "reference", "cuda": "reference"}
    lines = info.as_text(found).splitlines()
    heading = next(i for i, line in enumerate(lines) if line.startswith("op "))
    starts = [lines[heading].index(name) for name in ("on cpu", "on cuda")]
    rows = lines[heading + 1 : lines.index("", heading)]
    for line, (op, chosen) in zip(rows, found["ops"].items(), strict=True):
        assert line[: starts[0]].split() == [op]
        assert [line[start:].split()[0] for start in starts] == [chosen["cpu"], chosen["cuda"]]


@pytest.mark.parametrize("unbuffered", ["", pytest.param("1", marks=pytest.mark.slow)], ids=["buffered", "unbuffered"])
def test_a_reader_may_leave_early(unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        done = subprocess.run(
            [sys.executable, "-m", "auglocal_ext", "info"],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=pipe,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, "")


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    info.add_parser(parser.add_subparsers())
    arguments = parser.parse_args(["info", "--json"])
    assert arguments.run(arguments) == 0
    assert json.loads(capsys.readouterr().out)["versions"]["auglocal_ext"]


def test_automatic_choice_takes_the_next_one_in_silence(no_compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(providers.ENVIRONMENT, raising=False)
    monkeypatch.setitem(providers._REASONS, "triton", lambda: "no triton")
    assert providers.choose(OP, "cpu", torch.float32) == "aten"
    assert providers.choose(OP, "cuda", torch.float32) == "aten"
    out = pooled_cross_entropy(torch.randn(2, 3), torch.randn(4, 3), None, torch.tensor([0, 1]))
    assert out.loss.isfinite()


def test_named_provider_that_is_missing_raises_with_its_reason(no_compiled: None) -> None:
    with pytest.raises(RuntimeError, match="provider='cpu' was asked for.*no compiler for cpu"):
        pooled_cross_entropy(torch.randn(2, 3), torch.randn(4, 3), None, torch.tensor([0, 1]), provider="cpu")


def test_order_of_preference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(providers.ENVIRONMENT, raising=False)
    for name in providers.NAMES:
        monkeypatch.setitem(providers._REASONS, name, lambda: None)
    assert providers.choose(OP, "cpu", torch.float32) == "cpu"
    assert providers.choose(OP, "cuda", torch.float32) == "cuda"
    assert providers.choose(OP, "cuda", torch.float64) == "aten"
    assert providers.choose(OP, "mps", torch.float32) == "reference"
    # Torch adds the gradients of max pooling on CUDA in no fixed order.
    assert providers.choose("batch_norm_act_max_pool", "cuda", torch.float64) == "reference"
    assert providers.choose("batch_norm_act_max_pool", "cpu", torch.float64) == "cpu"
    monkeypatch.setitem(providers._REASONS, "cuda", lambda: "not built")
    assert providers.choose(OP, "cuda", torch.float32) == "triton"


def test_environment_variable(no_compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(providers.ENVIRONMENT, "reference")
    assert providers.choose(OP, "cuda", torch.float32) == "reference"
    monkeypatch.setenv(providers.ENVIRONMENT, "cuda")
    assert providers.choose(OP, "cpu", torch.float32) == "aten"  # cuda has no opinion on a CPU tensor
    with pytest.raises(RuntimeError, match="AUGLOCAL_PROVIDER=cuda was asked for.*no compiler for cuda"):
        providers.choose(OP, "cuda", torch.float32)
    assert providers.choose(OP, "cuda", torch.float32, "reference") == "reference"
    monkeypatch.setenv(providers.ENVIRONMENT, "fastest")
    with pytest.raises(ValueError, match="AUGLOCAL_PROVIDER='fastest': expected auto, reference"):
        providers.choose(OP, "cpu", torch.float32)


def test_provider_that_does_not_fit_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in providers.NAMES:
        monkeypatch.setitem(providers._REASONS, name, lambda: None)
    with pytest.raises(ValueError, match="serves tensors on cuda, got one on cpu"):
        providers.choose(OP, "cpu", torch.float32, "cuda")
    with pytest.raises(TypeError, match="takes bfloat16, float16, float32, got torch.float64"):
        providers.choose(OP, "cuda", torch.float64, "cuda")

"""``benchmarks/fused_step.py``: steps that compute the same, of which one is fused; turns; a result file."""

from __future__ import annotations

import copy
import json
from functools import partial

import pytest
import torch

from auglocal_ext import models


@pytest.fixture
def benchmark(load_benchmark, monkeypatch):
    module = load_benchmark("fused_step")
    monkeypatch.setattr(module, "NETWORKS", {"tiny": partial(models.resnet_cifar, 8, width=4)})
    return module


def test_every_line_has_both_times_and_peaks(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "multiplies_bfloat16", lambda: True)
    assert benchmark.main(["--quick", "--batch", "2", "--output", str(tmp_path)]) == 0
    found, printed = json.loads((tmp_path / "fused-step-cpu.json").read_text()), capsys.readouterr().out
    lines = found["results"]
    assert len({(line["rule"], line["layout"], line["dtype"]) for line in lines}) == len(lines) == 8
    for line in lines:
        assert line["fused"]["runs"] == line["eager"]["runs"] == 10
        assert line["ratio"] == pytest.approx(line["fused"]["median"] / line["eager"]["median"])
        assert 0 < line["fused_peak"] < line["eager_peak"]
    assert printed.count("\ntiny ") == 8 and {"environment", "method", "settings"} <= set(found)


def test_without_an_instruction_there_is_no_bf16(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(benchmark, "RULES", ("BP",))
    benchmark.main(["--quick", "--batch", "2", "--output", str(tmp_path)])
    lines = json.loads((tmp_path / "fused-step-cpu.json").read_text())["results"]
    assert {line["dtype"] for line in lines} == {"fp32"} and "does not multiply it" in capsys.readouterr().out


@pytest.mark.parametrize("rule", ["BP", "AugLocal d=2"])
def test_both_sides_train_alike_and_one_is_fused(benchmark, rule):
    trained, images, labels = {}, torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 9, 1])
    for side in ("eager", "fused"):
        torch.manual_seed(0)
        net = models.resnet_cifar(8, width=4)
        before = copy.deepcopy(net.state_dict())
        step = benchmark.step(rule, net, side == "fused", images, labels, None)
        step()
        assert not any(torch.equal(before[name], value) for name, value in net.named_parameters())
        trained[side] = [*net.parameters()]
        assert type(net.stem).__module__.startswith("auglocal_ext.nn") is (side == "fused")
    for a, b in zip(trained["fused"], trained["eager"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)

"""``benchmarks/shards.py`` counts what the arithmetic says."""

from __future__ import annotations

import json

import pytest


def test_shards_are_rows_of_every_parameter(load_benchmark, tmp_path, capsys):
    benchmark = load_benchmark("shards")
    assert (
        benchmark.main(["--network", "resnet8", "--depth", "2", "--replicas", "1", "3", "--output", str(tmp_path)]) == 0
    )
    one, three = json.loads((tmp_path / "shards.json").read_text())["rows"]
    net = benchmark.build("resnet8", 2)
    assert one["parameters"] == one["momentum"] == 4 * sum(p.numel() for p in net.parameters())
    rows = sum(-(-p.shape[0] // 3) * p.shape[1:].numel() for p in net.parameters())
    assert three["parameters"] == three["momentum"] == 4 * rows
    sizes = [4 * sum(p.numel() for p in module.parameters()) for module in net.local_modules]
    assert three["gathered"] == max(map(sum, zip(sizes, sizes[1:], strict=False)))
    total = (2 * 4 * rows + three["gathered"]) / (2 * one["parameters"])
    assert f"{100 * total:.0f}% |" in capsys.readouterr().out


def test_replicas_are_positive(load_benchmark, capsys):
    with pytest.raises(SystemExit):
        load_benchmark("shards").main(["--replicas", "0"])
    assert "--replicas must be positive" in capsys.readouterr().err

"""``benchmarks/host.py``: pairs with the same results, of which one side is fused; turns; a result file."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from auglocal_ext.ops import providers, tuning

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def benchmark(load_benchmark, monkeypatch):
    for name, value in {providers.ENVIRONMENT: "auto", tuning.ENVIRONMENT: "0"}.items():
        monkeypatch.setenv(name, value)  # undoes what the benchmark sets
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return load_benchmark("host")


@pytest.fixture
def one_pair(benchmark, monkeypatch):
    """The benchmark with its first row alone."""
    first = benchmark.pairs("cpu")[:1]
    monkeypatch.setattr(benchmark, "pairs", lambda device: first)
    return benchmark


def record(tmp_path):
    return json.loads((tmp_path / "host-cpu.json").read_text())


def test_every_row_has_both_times(benchmark, tmp_path, capsys):
    assert benchmark.main(["--device", "cpu", "--quick", "--output", str(tmp_path)]) == 0
    found, printed = record(tmp_path), capsys.readouterr().out
    names = [row["name"] for row in found["results"]]
    assert len(set(names)) == len(names) and all(f"\n{name} " in printed for name in names)
    assert set(providers.TABLES) <= {name.partition(",")[0] for name in names}
    for row in found["results"]:
        fused, eager = row["fused"], row["eager"]
        assert fused["runs"] == eager["runs"] == 10 and not row["error"]
        assert row["ratio"] == pytest.approx(fused["median"] / eager["median"])
    assert {"environment", "method", "device", "settings"} <= set(found)
    assert set(found["settings"]["providers"]) == set(providers.TABLES) and torch.get_num_threads() == 1


def test_one_side_is_fused_and_the_other_is_torchs(benchmark):
    def nodes(side) -> set[str]:
        """Names of the autograd nodes behind what a side returns."""
        out = side.forward()
        todo, seen = [t.grad_fn for t in (out if isinstance(out, tuple) else (out,))], set()
        while todo:
            node = todo.pop()
            if node is not None and node not in seen:
                seen.add(node)
                todo += [after for after, _ in node.next_functions]
        return {node.name() for node in seen}

    for pair in benchmark.pairs("cpu"):
        fused, eager = nodes(pair.fused), nodes(pair.eager)
        torchs = {
            name for name in fused | eager if re.fullmatch(r"\w+Backward\d|torch::autograd::AccumulateGrad", name)
        }
        assert fused - torchs and not eager - torchs, (pair.name, fused, eager)


def test_a_provider_is_used_or_refused(one_pair, tmp_path, capsys):
    options = ["--device", "cpu", "--quick", "--output", str(tmp_path), "--provider"]
    assert one_pair.main([*options, "reference"]) == 0
    assert set(record(tmp_path)["settings"]["providers"].values()) == {"reference"}
    with pytest.raises(SystemExit):
        one_pair.main([*options, "cuda"])
    assert "--provider cuda serves no op on cpu" in capsys.readouterr().err


def test_a_row_with_other_gradients_or_none_is_an_error(one_pair, tmp_path, capsys, monkeypatch):
    (pair,) = one_pair.pairs("cpu")

    def fails() -> Tensor:
        raise RuntimeError("not built")

    doubled = (lambda: 2 * pair.eager.forward()), "gradient 0 differs from eager's by 1 of"
    for forward, told in (doubled, (fails, "RuntimeError: not built")):
        wrong = replace(pair, fused=pair.fused._replace(forward=forward))
        monkeypatch.setattr(one_pair, "pairs", lambda device, wrong=wrong: [wrong, pair])
        assert one_pair.main(["--device", "cpu", "--quick", "--output", str(tmp_path)]) == 1
        bad, good = record(tmp_path)["results"]
        assert told in bad["error"] and bad["fused"] is None and good["ratio"] > 0
        assert told in capsys.readouterr().out


def test_turns_without_a_flush_and_with_a_bound(load_benchmark):
    load_benchmark("host")
    from _timing import in_turn

    called: list[str] = []
    functions = {name: lambda name=name: called.append(name) for name in "ab"}
    found = in_turn(functions, 10, lambda: called.append("."), 12)
    assert {name: spread.runs for name, spread in found.items()} == {"a": 12, "b": 12}
    order = "".join(called[6:])
    assert order in (".a.b" * 12, ".b.a" * 12)

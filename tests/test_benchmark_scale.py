"""``benchmarks/scale.py``: the model where the answer is known, its counts, its files, and real stages."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest

from auglocal_ext.planning.estimate import StepEstimate

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "scale"
TINY = ["--network", "resnet8", "--modules", "0", "--batch", "32", "--stages", "2", "--replicas", "2"]
STAGES = (2, 4, 8)


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("scale")


@pytest.fixture
def model(benchmark):
    return sys.modules["_scale_model"]


@pytest.fixture
def ideal(model):
    """A machine of 1 FLOP/s with links that take no time."""
    return model.Machine(1.0, math.inf, 0.0)


def modules(model, count=8, sends=0.0, gradients=0.0):
    return [model.Local(2.0 + k % 3, 1.0, 10.0 + k, sends, gradients) for k in range(count)]


def layers(model, count=8, sends=0.0, gradients=0.0):
    return [model.Layer(1.0, 1.0, 1.0, 10.0, 2.0, sends, gradients)] * count


def test_one_rank_takes_the_sum_of_its_modules(model, ideal):
    found = model.local(modules(model), 1, 1, 1, ideal)
    assert found.seconds == sum(module.work for module in modules(model)) == 23
    assert (found.fill, found.traffic, found.peak, found.idle) == (0, 0, 17, 0)
    for run in (
        model.data_parallel(layers(model), 1, 3, ideal),
        model.pipelined(layers(model), 1, 1, 3, 1, ideal, False),
        model.pipelined(layers(model), 1, 1, 3, 3, ideal, True),
    ):
        assert run.seconds == 3 * 24 and run.idle == run.traffic == 0


@pytest.mark.parametrize("stages", STAGES)
def test_local_stages_take_the_time_of_the_slowest(model, ideal, stages):
    equal = [model.Local(3.0, 3.0, 0.0, 6.0, 0.0)] * 8
    found = model.local(equal, stages, 1, 1, ideal)
    assert found.seconds == 24 / stages and found.idle == 0
    assert (
        found.fill == (stages - 1) * found.seconds
    )  # sent when all of a stage's work is done; earlier if forward < work
    assert model.local(modules(model), stages, 1, 1, ideal).fill < (stages - 1) * found.seconds
    unequal = [model.Local(w, w, 0.0, 0.0, 0.0) for w in (1.0, 5.0, 2.0)]
    assert model.local(unequal, 3, 1, 1, ideal).seconds == 5
    # A slow link sets the pace instead, and only where it takes longer than the slowest stage.
    fast, slow = (model.Machine(1.0, bandwidth, 0.5) for bandwidth in (6.0, 0.1))
    assert model.local(equal, stages, 1, 1, fast).seconds == 24 / stages
    linked = model.local(equal, stages, 1, 1, slow)
    assert linked.seconds == pytest.approx(60.5) and linked.idle == pytest.approx(1 - 24 / stages / 60.5)
    assert linked.fill == pytest.approx((stages - 1) * (24 / stages + 60.5))
    assert found.traffic == (stages - 1) * 6


@pytest.mark.parametrize("stages", STAGES)
@pytest.mark.parametrize("micro", [8, 32])
def test_pipelines_of_backpropagation_have_the_bubbles_of_their_papers(model, ideal, stages, micro):
    one_f_one_b, zero = (model.pipelined(layers(model), stages, 1, micro, micro, ideal, z) for z in (False, True))
    assert one_f_one_b.idle == pytest.approx((stages - 1) / (micro + stages - 1))
    layer = 8 / stages  # seconds of a stage's forward pass, of its gradients of inputs, of those of weights
    assert one_f_one_b.seconds == pytest.approx((micro + stages - 1) * 3 * layer)
    assert zero.seconds == pytest.approx(micro * 3 * layer + (stages - 1) * (layer + layer - layer))
    seconds = [[layer] * stages] * 3
    kept = [model.simulate(*seconds, [0.0] * (stages - 1), 0.0, micro, z)[2] for z in (False, True)]
    assert kept == [list(range(stages, 0, -1)), [stages] * stages]
    assert one_f_one_b.fill == zero.fill == pytest.approx((stages - 1) * layer)
    assert one_f_one_b.peak == zero.peak == stages * layer * 10 + 2


def test_a_link_stands_twice_between_forward_and_backward(model):
    machine = model.Machine(1.0, 1.0, 4.0)
    found = model.pipelined(layers(model, 2, sends=1.0), 2, 1, 1, 1, machine, False)
    assert found.seconds == 6 + 2 * (1 + 4) and found.traffic == 2
    busy = model.pipelined(layers(model, 2, sends=100.0), 2, 1, 2, 2, machine, False)
    # Two messages follow one another: they leave at 1 and 101, the second gradient at 208.
    assert busy.seconds == 205 + 1 + 2 + 104 + 2


def test_gradients_travel_beside_the_next_module(model):
    machine = model.Machine(1.0, 1.0, 0.0)
    assert machine.all_reduce(8.0, 4) == 12 and machine.all_reduce(8.0, 1) == 0
    assert model.Machine(1.0, math.inf, 0.5).all_reduce(8.0, 1024) == 10
    hidden, exposed = ([model.Local(5.0, 1.0, 0.0, 0.0, g)] * 4 for g in (5.0, 7.0))  # 5 and 7 seconds, two replicas
    assert model.local(hidden, 1, 2, 1, machine).seconds == 4 * 5 + 5
    assert model.local(exposed, 1, 2, 1, machine).seconds == 5 + 4 * 7
    assert model.local(exposed, 1, 2, 3, machine).seconds == 2 * 20 + 5 + 4 * 7  # the last of three calls
    assert model.local(exposed, 2, 2, 1, machine).traffic == 2 * 4 * 7
    assert model.local(exposed, 1, 2, 3, machine).peak == 4 * 7  # kept between the calls


def test_data_parallel_backpropagation(model, ideal):
    few = layers(model, gradients=100.0)
    assert model.data_parallel(few, 16, 2, ideal).seconds == 2 * 24
    slow = model.Machine(1.0, 0.01, 0.0)
    found = model.data_parallel(few, 16, 2, slow)
    assert found.seconds == pytest.approx(2 * 24 + 2 * 15 / 16 * 800 / 0.01)  # one bucket, after the backward pass
    assert found.traffic == 2 * 15 * 800
    many = layers(model, gradients=2.0**25)  # a bucket each: all but the last are hidden
    found = model.data_parallel(many, 2, 2, model.Machine(1.0, 2.0**25, 0.0))
    assert found.seconds == 2 * 24 + 1
    assert found.peak == 2 * (80 + 2) + 8 * 2**25


def test_a_slow_rank_slows_all(model):
    slow = model.Machine(1.0, math.inf, 0.0, 2.0)
    assert model.local([model.Local(3.0, 1.0, 0.0, 0.0, 0.0)] * 8, 8, 1, 1, slow).seconds == 6
    assert model.data_parallel(layers(model), 8, 1, slow).seconds == 48
    found = model.pipelined(layers(model), 8, 1, 32, 32, slow, False)
    assert 32 * 6 < found.seconds < 39 * 6


def test_more_stages_than_modules_are_refused(model, ideal):
    with pytest.raises(ValueError, match="9 stages need as many modules, and there are 8"):
        model.local(modules(model), 9, 1, 1, ideal)


def test_counts_are_those_of_the_step(benchmark):
    counts = sys.modules["_scale_counts"]
    found, images = counts.layers("resnet8"), counts.SAMPLE
    _, net = counts.fake("resnet8", "Greedy", 1)  # one module is backpropagation
    options = {"autocast": None, "clip_norm": None, "clip": "module", "accumulate": 1}
    cost = StepEstimate(net, images, counts.sgd, params=list(net.parameters()), **options).cost("none")
    assert images * sum(layer.work for layer in found) == cost.modules[0].flops
    peak = sys.modules["_scale_model"].data_parallel(found, 1, images, benchmark.Machine(1.0, 1.0, 0.0)).peak
    exact = cost.modules[0].peak - cost.base
    assert exact <= peak <= 1.05 * exact  # counted by itself, a layer has its output's gradient to the end
    tensors = [*net.primary.parameters(), *(b for b in net.primary.buffers() if b.is_floating_point())]
    assert sum(layer.gradients for layer in found) == 4 * sum(t.numel() for t in tensors)
    assert [layer.sends for layer in found] == [4 * n for n in (16 * 32 * 32, 16 * 32 * 32, 32 * 16 * 16, 0)]

    local = counts.local_modules("resnet8", "AugLocal d=2", None, 4)
    assert [module.sends for module in local] == [4 * 4 * n for n in (16 * 32 * 32, 16 * 32 * 32, 0)]
    assert sum(module.forward for module in local) == 4 * sum(layer.forward for layer in found)
    assert all(0 < module.forward <= module.work / 2 for module in local)
    # Inputs of earlier modules travel along.
    assert counts.local_modules("resnet8", "ContSup R1E", 3, 4)[1].sends > local[1].sends


def test_files_of_the_model(benchmark, tmp_path, capsys):
    options = [*TINY, "--microbatches", "4", "--bandwidth", "10", "1", "--output", str(tmp_path)]
    assert benchmark.main(options) == 0
    report = json.loads((tmp_path / "scale.json").read_text())
    assert report["kind"] == "model" and report["settings"]["batch"] == 32 and report["versions"]["torch"]
    assert (tmp_path / "scale.md").read_text() == benchmark.page(report)
    assert "A model; nothing is measured." in capsys.readouterr().out
    assert (tmp_path / "scale.png").read_bytes().startswith(b"\x89PNG")
    methods = ["AugLocal d=2, 3 modules", "AugLocal d=2, 3 modules, accumulated"]
    methods += ["BP 1F1B", "BP zero bubble", "BP data parallel"]
    found = {(row["bandwidth"], row["ranks"], row["method"]): row for row in report["rows"]}
    assert list(found) == [
        (bandwidth, ranks, method)
        for bandwidth in (10, 1)
        for ranks in (1, 2, 4)
        for method in (methods if ranks > 1 else [methods[0], methods[-1]])
    ]
    for (_, ranks, method), row in found.items():
        assert row["efficiency"] == 1 if ranks == 1 else 0 < row["efficiency"] < 1
        assert row["images_per_second"] == 32 / row["seconds"] <= found[10, ranks, method]["images_per_second"]
        assert row["microbatches"] == (1 if method in (methods[0], methods[-1]) else 4) and row["peak"] > 0
        assert (row["traffic"] > 0) == (ranks > 1)
    lines = [line for line in benchmark.page(report).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 * (2 + len(found) // 2)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rule", "MAN"], "messages are not modelled"),
        (["--batch", "30"], "--batch must be a multiple of 2 stages x 2 replicas"),
        (["--batch", "4", "--stages", "1", "--replicas", "4"], "--batch must be"),
        (["--stages", "4", "--batch", "64"], "4 stages need as many modules, and there are 3"),
        (["--slow", "0.5"], "--slow at least 1"),
        (["--flops", "0"], "--flops must be positive"),
        (["--measure", "1"], "at least 2"),
        (["--measure", "4"], "4 stages need as many modules, and there are 3"),
    ],
)
def test_what_does_not_fit_is_refused(benchmark, capsys, tmp_path, options, told):
    with pytest.raises(SystemExit) as ended:
        benchmark.main([*TINY, *options, "--output", str(tmp_path)])
    assert ended.value.code == 2 and told in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_real_stages_beside_the_model(benchmark, tmp_path):
    options = ["--measure", "2", "--batches", "2", "--repeats", "2", "--output", str(tmp_path)]
    assert benchmark.main([*TINY[:4], "--batch", "8", *options]) == 0
    report = json.loads((tmp_path / "scale-measured.json").read_text())
    (found,) = report["runs"]
    alone = [stage["alone"] for stage in found["stages"]]
    assert found["ranks"] == 2 and [len(times) for times in alone] == [found["cuts"][0], 3 - found["cuts"][0]]
    assert found["sent_bytes"] == [4 * 8 * 16 * 32 * 32]
    assert found["predicted"] >= found["ideal"] == max(*map(sum, alone), sum(map(sum, alone)) / found["cores"])
    assert all(0 < stage["until_sent"] < sum(stage["alone"]) for stage in found["stages"])
    # No batch takes less than the slowest stage, but for the noise of a busy machine.
    assert len(found["measured"]) == 2 and min(found["measured"]) > found["ideal"] / 3
    assert found["latency"] > 0 and found["bandwidth"] > 0
    assert (tmp_path / "scale-measured.md").read_text() == benchmark.measured_page(report)


def test_the_published_table_is_that_of_its_record(benchmark):
    report = json.loads((RESULTS / "scale.json").read_text())
    assert (RESULTS / "scale.md").read_text() == benchmark.page(report)
    assert max(row["ranks"] for row in report["rows"]) == 1024

"""``benchmarks/step.py`` at a tiny size: rows that train, counters that count, table, JSON, pictures, errors."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from torch.nn import functional as F

NETWORK = "resnet8"  # four layers: AugLocal d=2 fits, d=6 does not
ROWS = (
    "BP",
    "BP bf16",
    "BP checkpointing",
    "released loop d=2",
    "released loop d=2 bf16",
    "AugLocal d=2 eager",
    "AugLocal d=2 fused",
    "AugLocal d=2 bf16",
    "AugLocal d=2 per-module",
    "AugLocal d=2 graph",
    "AugLocal d=2 peak",
)


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("step")


def row_of(benchmark, name):
    (row,) = [row for row in benchmark.rows() if row.name == name]
    return row


def built(benchmark, name, batch=8):
    torch.manual_seed(0)
    row = row_of(benchmark, name)
    return row.build(row, NETWORK, batch)


def trained(benchmark, name, steps):
    step = built(benchmark, name)
    for _ in range(steps):
        step()
    # Without buffers: checkpointing as torch does it moves BatchNorm's running statistics twice.
    return {key: parameter.detach().clone() for key, parameter in step.net.named_parameters()}


def settings(benchmark, **changes):
    return benchmark.Settings(
        **{"device": "cpu", "batch": 8, "timed_batch": 4, "seconds": 0, "row_limit": 60, **changes}
    )


@pytest.mark.parametrize("name", ROWS)
def test_a_step_changes_every_parameter(benchmark, name):
    step = built(benchmark, name)
    before = {key: p.detach().clone() for key, p in step.net.named_parameters()}
    step()
    assert not [key for key, p in step.net.named_parameters() if torch.equal(p, before[key])]


@pytest.mark.parametrize(
    ("one", "other", "tolerance"),
    [
        ("BP", "BP checkpointing", 1e-5),
        ("AugLocal d=2 eager", "released loop d=2", 1e-4),
        ("AugLocal d=2 eager", "AugLocal d=2 fused", 1e-4),
        ("AugLocal d=2 bf16", "AugLocal d=2 per-module", 1e-6),
        ("AugLocal d=2 per-module", "AugLocal d=2 graph", 0),
        ("AugLocal d=2 per-module", "AugLocal d=2 peak", 0),
    ],
)
def test_rows_that_stand_for_the_same_training_train_the_same(benchmark, one, other, tolerance):
    a, b = trained(benchmark, one, 2), trained(benchmark, other, 2)
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(
            a[key], b[key], rtol=tolerance, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_half_rows_are_in_bf16_and_channels_last(benchmark):
    step = built(benchmark, "released loop d=2 bf16")
    seen = []
    step.net.primary.layer1_0.register_forward_hook(lambda module, args, out: seen.append(out))
    step()
    assert seen[0].dtype == torch.bfloat16
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_the_compiled_loop_trains_as_the_released_one(benchmark):
    from _networks import compiling

    with compiling(True):
        compiled = trained(benchmark, "compiled loop d=2 bf16", 1)
    eager = trained(benchmark, "released loop d=2 bf16", 1)
    for key in eager:
        torch.testing.assert_close(compiled[key], eager[key], rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("function", "reads"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: float(x[0]) + float(x[1]), 2),
        (lambda x: x[x > 0], 1),
        (lambda x: torch.nonzero(x), 1),
        (lambda x: bool((x > 0).any()), 1),
        (lambda x: x[torch.tensor([0, 2])], 0),
        (lambda x: F.relu(x).sum(), 0),
    ],
)
def test_reads_on_the_host_are_counted(benchmark, function, reads):
    from _counters import count_operators

    x = torch.tensor([1.0, -2.0, 3.0])
    counts = count_operators(lambda: function(x))
    assert counts["host_reads"] == reads == sum(counts["host_reads_by_name"].values())
    assert counts["operators"] >= max(1, reads)


def test_a_step_of_ours_reads_nothing_but_the_labels(benchmark):
    from _counters import count_operators

    for name, reads in (("BP", 0), ("released loop d=2", 0), ("AugLocal d=2 per-module", 1)):
        step = built(benchmark, name)
        step()
        assert count_operators(step)["host_reads"] == reads, name


def test_runtime_calls_count_within_the_step_alone(benchmark):
    from _counters import runtime_calls

    events = [("cudaDeviceSynchronize", 1, 2), ("counted step", 10, 20), ("cudaLaunchKernel", 9, 11)]
    events += [("cudaLaunchKernel", 11, 12), ("cudaLaunchKernelExC", 12, 13), ("cuLaunchKernel", 14, 15)]
    events += [("cudaGraphLaunch", 15, 16), ("cudaMemcpyAsync", 17, 18), ("cudaStreamSynchronize", 19, 20)]
    events += [("aten::add", 12, 13), ("cudaDeviceSynchronize", 21, 22)]
    counts = runtime_calls(events)
    assert (counts["launches"], counts["copies"], counts["waits"]) == (4, 1, 1)
    assert "aten::add" not in counts["calls_by_name"]
    with pytest.raises(RuntimeError, match="recorded no step"):
        runtime_calls(events[:1])


@pytest.mark.slow
def test_table_json_and_picture(benchmark, tmp_path, capsys):
    arguments = ["--network", NETWORK, "--batch", "32", "--cpu-batch", "4", "--device", "cpu", "--quick"]
    arguments += ["--part", "table", "--rows", "BP", "per-module", "graph"]
    assert benchmark.main([*arguments, "--output", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "predicted at batch 32" in printed and "real steps on the CPU at batch 4" in printed
    assert "CUDA graphs need a CUDA device" in printed
    assert "depth <= 3" in printed  # what AugLocal says about d=6 on four layers; the other rows go on

    record = json.loads((tmp_path / "step-cpu.json").read_text())
    assert (record["settings"]["batch"], record["settings"]["timed_batch"]) == (32, 4)
    assert record["versions"]["torch"] == torch.__version__ and record["machine"]["cores"]
    rows = {row["name"]: row for row in record["networks"][NETWORK]}
    assert [name for name in rows if name.startswith("BP")] == [
        "BP",
        "BP bf16",
        "BP checkpointing",
        "BP checkpointing bf16",
    ]
    bp, ours = rows["BP"], rows["AugLocal d=2 graph"]
    assert bp["seconds_per_step"]["runs"] == 3 and bp["images_per_second"] > 0
    assert bp["predicted_peak_bytes"] > 1.5 * rows["BP bf16"]["predicted_peak_bytes"]
    assert bp["allocated_peak_bytes"] is None and bp["graphed"] is None and bp["errors"] == {}
    assert bp["counts"]["operators"] > 50 and bp["counts"]["host_reads"] == 0
    assert ours["graphed"] is False and "cpu" in ours["eager_reason"] and ours["options"]["graph"] == "auto"
    assert rows["AugLocal d=2 per-module"]["eager_reason"] is None  # it asked for no graph
    failed = rows["AugLocal d=6 graph"]
    assert failed["errors"]["step"].startswith("ValueError") and failed["seconds_per_step"] is None
    assert (tmp_path / "step-cpu.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_scaling_over_depth_and_batch(benchmark, tmp_path, monkeypatch):
    import _step_scaling

    lines = [row_of(benchmark, name) for name in ("BP bf16", "AugLocal d=2 graph")]
    monkeypatch.setattr(_step_scaling, "scaling_rows", lambda: lines)
    monkeypatch.setattr(_step_scaling, "BATCH_NETWORK", NETWORK)
    arguments = [
        "--device",
        "cpu",
        "--batch",
        "32",
        "--part",
        "scaling",
        "--depths",
        "20",
        "26",
        "--batches",
        "8",
        "32",
    ]
    assert benchmark.main([*arguments, "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "step-cpu-scaling.json").read_text())
    assert record["settings"]["batch"] == 32 and not (tmp_path / "step-cpu.json").exists()
    peaks = {(point["over"], point["at"], point["name"]): point["predicted_peak_bytes"] for point in record["scaling"]}
    assert len(peaks) == 8
    assert peaks["depth", 26, "BP bf16"] > 1.2 * peaks["depth", 20, "BP bf16"]
    assert peaks["depth", 26, "AugLocal d=2 graph"] < 1.2 * peaks["depth", 20, "AugLocal d=2 graph"]
    assert peaks["batch", 32, "BP bf16"] > 1.3 * peaks["batch", 8, "BP bf16"]
    assert (tmp_path / "step-cpu-scaling.png").read_bytes().startswith(b"\x89PNG")


def test_without_times_and_without_real_steps(benchmark):
    row = row_of(benchmark, "BP")
    counted = benchmark.run_row(row, NETWORK, settings(benchmark, seconds=0))
    assert counted.time is None and counted.counts["operators"] > 0
    predicted = benchmark.run_row(row, NETWORK, settings(benchmark, timed_batch=0))
    assert predicted.counts == {} and predicted.peak_bytes == counted.peak_bytes


def test_a_prediction_is_what_the_step_really_holds(benchmark):
    from auglocal_ext.memory import MemoryMeter

    for name in ("BP bf16", "AugLocal d=2 per-module"):
        step = built(benchmark, name)
        step()
        with MemoryMeter() as meter:
            meter.track(*step.tracked)
            step()
        predicted = benchmark.run_row(row_of(benchmark, name), NETWORK, settings(benchmark, timed_batch=0))
        assert predicted.peak_bytes == pytest.approx(meter.peak_bytes, rel=0.02), name


def test_the_small_batch_runs_what_was_planned_for_the_large_one(benchmark):
    peak = benchmark.run_row(row_of(benchmark, "AugLocal d=2 peak"), NETWORK, settings(benchmark, batch=256))
    plain = benchmark.run_row(row_of(benchmark, "AugLocal d=2 per-module"), NETWORK, settings(benchmark, batch=256))
    assert peak.peak_bytes == peak.planned < plain.peak_bytes
    assert set(peak.recompute) > {"none"} and sum(peak.as_dict()["recompute"].values()) == 3
    assert peak.counts["operators"] > plain.counts["operators"]


def test_a_row_that_fails_or_takes_too_long_says_so(benchmark):
    from dataclasses import replace

    def failing(row, network, batch):
        raise RuntimeError("no kernel\n   image")

    def slow(row, network, batch):
        time.sleep(20)

    row = row_of(benchmark, "BP")
    result = benchmark.run_row(replace(row, build=failing), NETWORK, settings(benchmark))
    assert result.errors == {"prediction": "RuntimeError: no kernel image", "step": "RuntimeError: no kernel image"}
    start = time.monotonic()
    result = benchmark.run_row(replace(row, build=slow), NETWORK, settings(benchmark, row_limit=0.2, timed_batch=0))
    assert result.errors["prediction"].startswith("TimeoutError") and time.monotonic() - start < 10
    late = benchmark.run_row(row, NETWORK, settings(benchmark, deadline=-math.inf))
    assert "--limit" in late.errors["step"] and late.peak_bytes is None


def test_what_is_read_on_a_gpu(benchmark, monkeypatch):
    import _step_measure

    class OnGpu(benchmark.Settings):
        cuda = True

    class Memory:
        def __init__(self, allocated_peak):
            self.allocated_peak, self.reserved_peak = allocated_peak, 100 + allocated_peak

    readings = iter([Memory(7), Memory(3)] * 2)
    monkeypatch.setattr(_step_measure, "release_device_memory", lambda: None)
    monkeypatch.setattr(_step_measure, "read_device_memory", lambda: next(readings))
    monkeypatch.setattr(
        _step_measure, "time_steps", lambda step, device, seconds: _step_measure.Spread(0.5, 0.4, 0.6, 3)
    )
    monkeypatch.setattr(_step_measure, "count_synchronisations", lambda step: 1)
    monkeypatch.setattr(_step_measure, "count_launches", lambda step: {"launches": 9, "waits": 2})
    on_gpu = OnGpu(device="cpu", batch=8, timed_batch=8, seconds=1, row_limit=60)
    row = row_of(benchmark, "AugLocal d=2 graph")
    eager = benchmark.run_row(row, NETWORK, on_gpu)
    assert not eager.errors and eager.predicted is None
    assert (eager.allocated, eager.reserved, eager.images_per_second) == (3, 103, 16)
    assert eager.counts == {"host_synchronisations": 2, "launches": 9, "waits": 2}

    line, reason = benchmark.table([eager.as_dict()], on_gpu).splitlines()[-2:]
    assert line.split()[-2:] == ["9", "2"] and "no graph: the batch is on cpu" in reason

    from auglocal_ext.step import LocalStep

    monkeypatch.setattr(LocalStep, "graphed", True)
    assert benchmark.run_row(row, NETWORK, on_gpu).allocated == 7  # a replay allocates nothing: the capture's peak


def test_a_stopped_command_goes_on(benchmark, tmp_path, monkeypatch, capsys):
    ran = []

    def run_row(row, network, given):
        if time.monotonic() > given.deadline or (len(ran) == 2 and limited):
            return benchmark.Result(row, errors={"step": benchmark.LEFT_OUT})
        ran.append(row.name)
        return benchmark.Result(row)

    monkeypatch.setattr(benchmark, "run_row", run_row)
    arguments = ["--network", NETWORK, "--device", "cpu", "--part", "table", "--rows", "d=2 eager", "BP"]
    arguments += ["--batch", "8", "--cpu-batch", "4", "--output", str(tmp_path)]
    limited = True
    assert benchmark.main([*arguments, "--limit", "1000"]) == 130
    assert ran == ["BP", "BP bf16"]
    limited = False
    file = tmp_path / "step-cpu.json"
    record = json.loads(file.read_text())
    record["networks"][NETWORK][1]["errors"] = {"step": benchmark.BEGUN}  # as a process that was killed leaves it
    file.write_text(json.dumps(record))
    assert benchmark.main([*arguments, "--resume"]) == 0
    assert ran[2:] == ["BP checkpointing", "BP checkpointing bf16", "AugLocal d=2 eager"]
    rows = json.loads(file.read_text())["networks"][NETWORK]
    assert [row["errors"] for row in rows] == [{}, {"step": benchmark.NEVER_ENDED}, {}, {}, {}]
    assert benchmark.main([*arguments, "--resume", "--batch", "16"]) == 0 and len(ran) == 10
    assert "holds other results (settings" in capsys.readouterr().out


def test_points_of_two_lines_run_once(benchmark, monkeypatch):
    import _step_scaling

    ran, told = [], []
    monkeypatch.setattr(
        _step_scaling, "run_row", lambda row, network, settings: ran.append((row.name, network, settings.batch))
    )
    found = _step_scaling.points(1024, [20, 32], [1024, 4096])
    _step_scaling.run_points(found, settings(benchmark), lambda point: None, lambda point, result: told.append(point))
    assert len(told) == len(found) == 16
    assert len(ran) == len(set(ran)) == 12  # resnet32 at batch 1024 is on both


def test_the_profiler_shows_the_step_as_a_range(benchmark):
    from _counters import ProfilerActivity, host_events

    x = torch.ones(4)
    events = host_events(lambda: [x.add_(1) for _ in range(3)], [ProfilerActivity.CPU])
    ((start, end),) = [(start, end) for name, start, end in events if name == "counted step"]
    assert [name for name, first, _ in events if start <= first <= end].count("aten::add_") == 3


@pytest.mark.parametrize(
    "arguments",
    [
        ["--batch", "1"],
        ["--cpu-batch", "1"],
        ["--rows", "nothing"],
        ["--network", "lenet"],
        ["--depths", "21"],
        ["--batches", "1"],
    ],
)
def test_wrong_options_end_with_a_message(benchmark, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.gpu
def test_synchronisations_and_launches_on_a_gpu(benchmark):
    from _counters import count_launches, count_synchronisations

    x = torch.ones(4, device="cuda")
    assert count_synchronisations(lambda: x.add_(1)) == 0
    assert count_synchronisations(lambda: x.sum().item()) == 1
    counts = count_launches(lambda: [x.add_(1) for _ in range(5)])
    assert (counts["launches"], counts["waits"]) == (5, 0)


@pytest.mark.gpu
def test_a_captured_step_is_one_launch_on_a_gpu(benchmark):
    on_gpu = settings(benchmark, device="cuda", batch=64, timed_batch=64, seconds=1e-3)
    eager = benchmark.run_row(row_of(benchmark, "AugLocal d=2 per-module"), NETWORK, on_gpu)
    graph = benchmark.run_row(row_of(benchmark, "AugLocal d=2 graph"), NETWORK, on_gpu)
    assert not eager.errors and not graph.errors
    assert graph.graphed and graph.eager_reason is None
    assert graph.counts["calls_by_name"]["cudaGraphLaunch"] == 1
    assert graph.counts["launches"] < 20 < eager.counts["launches"]
    assert graph.counts["host_synchronisations"] == eager.counts["host_synchronisations"] == 0
    assert graph.allocated == pytest.approx(eager.allocated, rel=0.05)

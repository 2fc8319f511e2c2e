"""``benchmarks/kernels.py``: no time contains Python (on a simulated device), lines that go on, a result file."""

from __future__ import annotations

import contextlib
import json
import time
import warnings
from collections.abc import Callable

import pytest
import torch


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("kernels")


class SimulatedDevice:
    """A host and a device with clocks of their own, in seconds; ``launch`` is what Python does."""

    def __init__(self, captures: bool = True) -> None:
        self.host = self.device = 0.0
        self.captures = captures
        self.slept: list[float] = []
        self.flushes = 0

    def launch(self, host: float, device: float) -> None:
        self.host += host
        self.device = max(self.host, self.device) + device

    def wait(self) -> None:
        self.host = max(self.host, self.device)

    def event(self):
        return SimulatedEvent(self)

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.launch(5e-6, seconds)

    def flush(self) -> None:
        self.flushes += 1
        self.launch(5e-6, 60e-6)

    def synchronize(self) -> None:
        self.wait()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        from _device_timing import CannotCaptureError

        if not self.captures:
            raise CannotCaptureError("it waits for the device 1 times")
        other = SimulatedDevice()
        function.__self__.device_of_work = other  # what it launches is recorded there
        function()
        function.__self__.device_of_work = self
        return lambda: self.launch(10e-6, other.device - other.host)


class SimulatedEvent:
    def __init__(self, device: SimulatedDevice) -> None:
        self._device, self._at = device, 0.0

    def record(self) -> None:
        self._device.launch(1e-6, 0)
        self._at = self._device.device

    def query(self) -> bool:
        return self._device.host >= self._at

    def synchronize(self) -> None:
        self._device.host = max(self._device.host, self._at)

    def elapsed_time(self, end: SimulatedEvent) -> float:
        return 1e3 * (end._at - self._at)


class Work:
    """Python of ``host_seconds`` that launches ``device_seconds``, and may wait for them."""

    def __init__(self, device: SimulatedDevice, host_seconds: float, device_seconds: float, waits: bool = False):
        self.device_of_work, self.waits = device, waits
        self.host_seconds, self.device_seconds = host_seconds, device_seconds

    def run(self) -> None:
        self.device_of_work.launch(self.host_seconds, self.device_seconds)
        if self.waits:
            self.device_of_work.wait()


@pytest.fixture
def timing(load_benchmark, monkeypatch):
    """``_device_timing`` whose host clock is the simulated one."""
    load_benchmark("kernels")
    import _device_timing

    def on(device: SimulatedDevice):
        class Clock:
            perf_counter = staticmethod(lambda: device.host)

        monkeypatch.setattr(_device_timing, "time", Clock)
        return _device_timing

    return on


@pytest.mark.parametrize("captures", [True, False])
@pytest.mark.parametrize("host", [350e-6, 5e-3])
def test_no_time_is_that_of_python(timing, captures, host):
    device = SimulatedDevice(captures)
    module = timing(device)
    work = Work(device, host, 20e-6)
    found = module.time_on(device, work.run, 0.1)
    assert len(found.seconds) >= 10 and found.seconds == pytest.approx([20e-6 + 1e-6] * len(found.seconds), rel=0.1)
    assert (found.way, found.why) == (
        (module.GRAPH, "") if captures else (module.SLEEP, "it waits for the device 1 times")
    )
    assert min(device.slept) >= 1e-3 and device.flushes >= len(found.seconds)


def test_a_sleep_that_was_too_short_is_made_longer(timing):
    device = SimulatedDevice(captures=False)
    module = timing(device)
    work = Work(device, 1e-4, 20e-6)
    calls = iter([1e-4] * 5 + [8e-3] * 1000)  # Python that becomes slower than it was when it was looked at

    def run() -> None:
        work.host_seconds = next(calls)
        work.run()

    found = module.time_on(device, run, 0.0, graph=False)
    assert found.seconds == pytest.approx([21e-6] * 10, rel=0.1) and found.why == "not tried"
    assert device.slept[0] == 1e-3 and device.slept[-1] >= 8e-3


def test_work_that_waits_for_the_device_has_no_time(timing):
    device = SimulatedDevice(captures=False)
    module = timing(device)
    with pytest.raises(module.HostBoundError, match="this time would be Python's"):
        module.time_on(device, Work(device, 1e-4, 20e-6, waits=True).run, 0.1)


@pytest.fixture
def cuda(load_benchmark, monkeypatch):
    """``_device_timing.Cuda`` on a torch.cuda that notes down what it is asked for."""
    load_benchmark("kernels")
    import _device_timing

    class Stream:
        def wait_stream(self, other):
            pass

    class Graph:
        fault = ""

        def capture_begin(self, capture_error_mode):
            asked.append(f"begin {capture_error_mode} {current[-1] is not main}")

        def capture_end(self):
            asked.append("end")
            if Graph.fault == "broken":
                raise RuntimeError("operation failed due to a previous error during capture\nCUDA kernel errors ...")
            if Graph.fault == "empty":
                warnings.warn("The CUDA Graph is empty. This usually means ...", stacklevel=1)

        def replay(self):
            asked.append("replay")

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        try:
            yield
        finally:
            current.pop()

    main, asked, mode = Stream(), [], []
    current = [main]
    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "stream": on,
        "current_stream": lambda: current[-1],
        "synchronize": lambda: None,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": mode.append,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(_device_timing, "_cycles_per_second", lambda: 1e9)
    found = _device_timing.Cuda(torch.empty(1))
    found.asked, found.current, found.graph, found.modes = asked, current, Graph, mode
    return found


def test_a_capture_is_on_a_stream_of_its_own_after_warm_up(cuda):
    calls = []
    replay = cuda.capture(lambda: calls.append(len(cuda.asked)))
    replay()
    assert cuda.asked == ["begin thread_local True", "end", "replay"]
    assert calls == [0, 0, 0, 0, 1] and len(cuda.current) == 1 and cuda.modes == ["warn", 0]


def test_what_waits_for_the_device_is_not_captured(cuda):
    from _device_timing import CannotCaptureError

    def waits():
        if cuda.modes and cuda.modes[-1] == "warn":
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    with pytest.raises(CannotCaptureError, match="waits for the device 1 times"):
        cuda.capture(waits)
    assert cuda.asked == [] and len(cuda.current) == 1


@pytest.mark.parametrize("fault", ["broken", "empty", "raises"])
def test_a_capture_that_fails_leaves_the_stream_as_it_was(cuda, fault):
    from _device_timing import BrokenCaptureError, CannotCaptureError

    def function():
        if fault == "raises" and cuda.asked:
            raise RuntimeError("not permitted")

    cuda.graph.fault = fault
    with pytest.raises(CannotCaptureError if fault == "empty" else BrokenCaptureError):
        cuda.capture(function)
    assert cuda.asked == ["begin thread_local True", "end"] and len(cuda.current) == 1


def arguments(tmp_path, *more):
    chosen = ["--op", "supervised_contrast", "--variant", "eager", "reference", "--dtype", "fp32"]
    return ["--device", "cpu", "--quick", *chosen, "--output", str(tmp_path), *more]


def record(tmp_path):
    return json.loads((tmp_path / "kernels-cpu.json").read_text())


@pytest.fixture
def quick(benchmark, monkeypatch):
    """The benchmark with times and bandwidths that take no time."""
    calls = []

    def measure(run, device, seconds, *, graph=True):
        calls.append(graph)
        return benchmark.Spread(1e-3, 1e-3, 1e-3, 10)

    def in_turn(runs, seconds):
        return {name: measure(run, "cpu", seconds) for name, run in runs.items()}

    monkeypatch.setattr(benchmark, "measure", measure)
    monkeypatch.setattr(benchmark, "in_turn", in_turn)
    monkeypatch.setattr(benchmark, "copy_bandwidth", lambda device, seconds: 1e10 + len(calls))
    benchmark.calls = calls
    return benchmark


def test_a_stopped_command_goes_on(quick, tmp_path, capsys):
    assert quick.main(arguments(tmp_path, "--limit", "0")) == 130
    assert record(tmp_path)["results"] == []
    assert quick.main(arguments(tmp_path, "--resume")) == 0
    assert [line["variant"] for line in record(tmp_path)["results"]] == ["eager", "reference"]
    assert quick.main(arguments(tmp_path, "--resume")) == 0 and len(quick.calls) == 2
    assert record(tmp_path)["copy_bytes_per_second"] == 1e10  # the one that the first lines are compared with
    capsys.readouterr()
    assert quick.main([*arguments(tmp_path, "--resume"), "--seconds", "3"]) == 0 and len(quick.calls) == 2
    changed = record(tmp_path) | {"settings": {"seconds_per_line": 1, "quick": True}}
    (tmp_path / "kernels-cpu.json").write_text(json.dumps(changed))
    assert quick.main(arguments(tmp_path, "--resume")) == 0 and len(quick.calls) == 4
    assert "holds other results (settings" in capsys.readouterr().out


def test_a_line_that_ended_its_process_is_not_tried_again(quick, tmp_path):
    assert quick.main(arguments(tmp_path, "--limit", "0")) == 130
    line = quick.asdict(quick.Result("supervised_contrast", "256x128", "fp32", "eager", None, 1, None))
    (tmp_path / "kernels-cpu.json").write_text(json.dumps(record(tmp_path) | {"begun": line}))
    assert quick.main(arguments(tmp_path, "--resume")) == 1
    eager, reference = record(tmp_path)["results"]
    assert "not tried again" in eager["error"] and not reference["error"] and record(tmp_path)["begun"] is None


def test_a_capture_that_broke_goes_on_in_a_new_process_without_a_graph(quick, tmp_path, monkeypatch):
    class Replaced(Exception):
        pass

    def broken(run, device, seconds, *, graph=True):
        if graph:
            raise quick.BrokenCaptureError("operation not permitted when stream is capturing")
        return quick.Spread(1e-3, 1e-3, 1e-3, 10)

    def start_over(script, given, deadline):
        assert script.endswith("kernels.py") and set(given) - set(arguments(tmp_path)) <= {"--resume"}
        raise Replaced

    def line_by_line(case, dtype, missing, options, report):  # as on CUDA
        for variant, function in missing.items():
            quick.measure_line(case, dtype, variant, function, options, report)

    monkeypatch.setattr(quick, "measure_in_turn", line_by_line)
    monkeypatch.setattr(quick, "measure", broken)
    monkeypatch.setattr(quick, "start_over", start_over)
    with pytest.raises(Replaced):
        quick.main(arguments(tmp_path))
    assert "not permitted" in record(tmp_path)["uncaptured"]["supervised_contrast, 256x128, fp32, eager"]
    assert record(tmp_path)["begun"] is None
    with pytest.raises(Replaced):
        quick.main(arguments(tmp_path, "--resume"))  # now the next line broke
    monkeypatch.setattr(quick, "start_over", None)
    assert quick.main(arguments(tmp_path, "--resume")) == 0
    assert len(record(tmp_path)["results"]) == 2


def test_a_new_process_gets_the_time_that_is_left(benchmark, monkeypatch):
    import _resume

    became = []
    monkeypatch.setattr(_resume.os, "execv", lambda program, given: became.append(given[1:]))
    _resume.start_over("kernels.py", ["--limit", "100"], time.monotonic() + 40)
    _resume.start_over("kernels.py", ["--quick"], float("inf"))
    assert became[0][:5] == ["kernels.py", "--limit", "100", "--resume", "--limit"] and 39 < float(became[0][5]) < 40
    assert became[1] == ["kernels.py", "--quick", "--resume"]
    assert benchmark.make_parser().parse_args(became[0][1:]).limit < 40


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [True, False])
def test_slow_python_is_not_timed_on_a_gpu(benchmark, graph):
    x = torch.randn(1 << 20, device="cuda")

    def slow() -> None:
        for _ in range(4):
            time.sleep(1e-3)
            x.mul_(1.0)

    found = benchmark.measure(slow, "cuda", 0.1, graph=graph)
    assert found.median < 1e-3
    assert found.way == ("graph replays" if graph else "behind a device sleep")


@pytest.mark.gpu
def test_work_that_waits_is_not_timed_on_a_gpu(benchmark):
    from _device_timing import HostBoundError

    x = torch.randn(1 << 20, device="cuda")
    with pytest.raises(HostBoundError):
        benchmark.measure(lambda: x.sum().item(), "cuda", 0.1)
    assert benchmark.measure(lambda: x.mul_(1.0), "cuda", 0.1).way == "graph replays"  # and nothing is broken


@pytest.mark.gpu
@pytest.mark.slow
def test_every_line_has_a_time_on_a_gpu(benchmark, tmp_path):
    chosen = ["--dtype", "bf16", "--variant", "eager", "cuda", "triton", "--quick", "--output", str(tmp_path)]
    assert benchmark.main(chosen) == 0
    lines = json.loads((tmp_path / "kernels-cuda.json").read_text())["results"]
    assert {line["variant"] for line in lines} == {"eager", "cuda", "triton"}
    assert {line["time"]["way"] for line in lines if line["variant"] != "eager"} == {"graph replays"}


def test_variants_take_turns_on_the_cpu(benchmark):
    from _timing import in_turn

    called = []
    spreads = in_turn({name: lambda name=name: called.append(name) for name in "abc"}, 0)
    assert {name: spread.runs for name, spread in spreads.items()} == dict.fromkeys("abc", 10)
    rounds = ["".join(called[at : at + 3]) for at in range(9, len(called), 3)]
    assert {"".join(sorted(each)) for each in rounds} == {"abc"} and len(set(rounds)) > 1
    assert not any(one == after for one, after in zip(called[9:], called[10:], strict=False))
    assert in_turn({}, 1) == {}

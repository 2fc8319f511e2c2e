"""Time of short work on a CUDA device, without the time Python needs to launch it.

Work that takes 20 us is launched by 350 us of Python. So every run is queued behind a sleep of the device, and counts
only if the device was still asleep when all of it had been launched. What can be captured is a replay of one graph.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _counters import count_synchronisations
from _torch_private import sleep_on_device

GRAPH, SLEEP = "graph replays", "behind a device sleep"
LEAST_SLEEP, MOST_SLEEP = 1e-3, 0.2  # seconds
WARMUP = 3


class CannotCaptureError(Exception):
    """The work cannot be recorded into a graph, and nothing was touched; the message says why."""


class BrokenCaptureError(RuntimeError):
    """CUDA broke off a capture, after which torch's allocator and generator of this process cannot be relied on."""


class HostBoundError(RuntimeError):
    """The device always had to wait for the host, so that no time of it is one of the device alone."""


@dataclass(frozen=True)
class DeviceTimes:
    """Seconds of each run; ``way`` is GRAPH or SLEEP, ``why`` the reason for not having captured a graph."""

    seconds: list[float]
    way: str
    why: str = ""


class Cuda:
    """What timing asks of the current CUDA device, its caches written over by ``flush``."""

    def __init__(self, flush: torch.Tensor) -> None:
        self._flush = flush
        self._stream = torch.cuda.Stream()
        self._cycles_per_second = _cycles_per_second()

    def event(self) -> Any:
        return torch.cuda.Event(enable_timing=True)

    def sleep(self, seconds: float) -> None:
        sleep_on_device(int(seconds * self._cycles_per_second))

    def flush(self) -> None:
        self._flush.zero_()

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def capture(self, function: Callable[[], Any]) -> Callable[[], None]:
        """The replay of a graph of ``function``.

        Raises:
            CannotCaptureError: if ``function`` waits for the device, which is found before anything is recorded.
            BrokenCaptureError: if the capture itself failed.
        """
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(WARMUP):  # on the stream of the capture: libraries make their workspaces per stream
                function()
            if count := count_synchronisations(function):
                raise CannotCaptureError(f"it waits for the device {count} times")
            torch.cuda.synchronize()
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                gc.collect()
                gc.disable()  # the end of an old graph or event within would break the capture off
                try:
                    graph.capture_begin(capture_error_mode="thread_local")
                    try:
                        function()
                    finally:
                        graph.capture_end()
                except Exception as error:
                    text = " ".join(str(error).split())
                    raise BrokenCaptureError(f"{type(error).__name__}: {text[:200]}") from error
                finally:
                    gc.enable()
            if any("empty" in str(warning.message) for warning in said):  # its replays would take no time at all
                raise CannotCaptureError("it launches nothing on the stream it is called on")
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay


def time_on(device: Any, function: Callable[[], Any], seconds: float, *, graph: bool = True) -> DeviceTimes:
    """Times of ``function`` for about ``seconds``, at least ten of them, with cold caches.

    Args:
        device: a :class:`Cuda`, or what behaves like one.
        graph: try to capture; without it the runs are launched one by one.

    Raises:
        HostBoundError: if no sleep is long enough for the host to be ahead, as for work that waits for the device.
        BrokenCaptureError: see there.
    """
    for _ in range(WARMUP):
        function()
    run, way, why = function, SLEEP, "" if graph else "not tried"
    if graph:
        try:
            run, way = device.capture(function), GRAPH
        except CannotCaptureError as error:
            why = str(error)
    sleep = max(LEAST_SLEEP, 3 * _host_seconds(device, run))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 10 or (time.perf_counter() < end and len(times) < 1000):
        if sleep > MOST_SLEEP:
            raise HostBoundError(
                f"after a sleep of {MOST_SLEEP:g} s the device still waited for the host: this time would be Python's"
            )
        found = _once(device, run, sleep)
        if found is None:
            sleep *= 2
        else:
            times.append(found)
    return DeviceTimes(times, way, why)


def _once(device: Any, run: Callable[[], Any], sleep: float) -> float | None:
    """Seconds between the events around one run; None if the device woke before all of it was launched."""
    start, end = device.event(), device.event()
    device.sleep(sleep)
    device.flush()
    start.record()
    run()
    end.record()
    ahead = not start.query()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 if ahead else None


def _host_seconds(device: Any, run: Callable[[], Any]) -> float:
    device.synchronize()
    start = time.perf_counter()
    run()
    host = time.perf_counter() - start
    device.synchronize()
    return host


def _cycles_per_second() -> float:
    """Of the clock that ``sleep_on_device`` counts, by events; the first sleep wakes the device."""
    cycles = 10_000_000
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    sleep_on_device(cycles)
    start.record()
    sleep_on_device(cycles)
    end.record()
    end.synchronize()
    return cycles / max(start.elapsed_time(end) / 1e3, 1e-4)

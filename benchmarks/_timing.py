"""Time, copy bandwidth and peak memory of a function, on CUDA or on the CPU."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from _device_timing import Cuda, time_on

from auglocal_ext.memory import MemoryMeter, release_device_memory


@dataclass(frozen=True)
class Spread:
    """Median of the times in seconds, with the 20th and 80th percentile.

    ``way``: how they were taken, and ``why``: the reason for not having replayed a graph; empty on the CPU.
    """

    median: float
    low: float
    high: float
    runs: int
    way: str = ""
    why: str = ""


def spread(times: list[float], way: str = "", why: str = "") -> Spread:
    low, *_, high = statistics.quantiles(times, n=5)
    return Spread(statistics.median(times), low, high, len(times), way, why)


def measure(function: Callable[[], Any], device: str, seconds: float, *, graph: bool = True) -> Spread:
    """Time ``function`` repeatedly for about ``seconds``, each time with cold caches.

    On CUDA replays of a graph of it, or runs behind a sleep of the device (also without ``graph``), after a write
    larger than the L2 cache; on the CPU by the clock, after a write of 64 MiB.

    Raises what :func:`_device_timing.time_on` does.
    """
    flush = torch.empty(_cache_bytes(device), dtype=torch.int8, device=device)
    if device == "cuda":
        found = time_on(Cuda(flush), function, seconds, graph=graph)
        return spread(found.seconds, found.way, found.why)
    for _ in range(3):
        function()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 10 or (time.perf_counter() < end and len(times) < 1000):
        times.append(_time_cpu(function, flush.zero_))
    return spread(times)


def in_turn(
    functions: dict[str, Callable[[], Any]],
    seconds: float,
    before: Callable[[], Any] | None = None,
    most: int = 1000,
) -> dict[str, Spread]:
    """Time functions by the clock, for about ``seconds`` each, one run of each after another, at most ``most`` rounds.

    What else the machine does meanwhile then slows all of them alike. The order of a round is random, but none runs
    twice in a row: it would find its own code where it left it. ``before`` is called before each run, outside its time:
    by default a write of 64 MiB, as :func:`measure` makes on the CPU.
    """
    if before is None:
        before = torch.empty(_cache_bytes("cpu"), dtype=torch.int8).zero_
    for function in functions.values():
        for _ in range(3):
            function()
    times: dict[str, list[float]] = {name: [] for name in functions}
    end, rounds = time.perf_counter() + seconds * len(functions), 0
    order, chance = [*functions], random.Random(0)
    while functions and (rounds < 10 or (time.perf_counter() < end and rounds < most)):
        last = order[-1]
        chance.shuffle(order)
        if rounds and order[0] == last:
            order.append(order.pop(0))
        for name in order:
            times[name].append(_time_cpu(functions[name], before))
        rounds += 1
    return {name: spread(found) for name, found in times.items()}


def time_steps(step: Callable[[], Any], device: str, seconds: float, least: int = 3, most: int = 50) -> Spread:
    """Time of whole training steps in a row, after warm-up: as many as fit into ``seconds``, within bounds.

    On CUDA from event to event without a wait between, so that the host may run ahead as it does in training.
    """
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    once = max(time.perf_counter() - start, 1e-6)
    runs = min(max(least, int(seconds / once)), most)
    times: list[float] = []
    if device == "cuda":
        events = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        events[-1].synchronize()
        times = [first.elapsed_time(last) / 1e3 for first, last in zip(events, events[1:], strict=False)]
    else:
        for _ in range(runs):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    return spread(times, "steps in a row, host included" if device == "cuda" else "")


def copy_bandwidth(device: str, seconds: float) -> float:
    """Bytes read and written per second by a plain copy much larger than the caches."""
    source = torch.empty((1 << 30) if device == "cuda" else (1 << 27), dtype=torch.int8, device=device).zero_()
    target = torch.empty_like(source)
    return 2 * source.numel() / measure(lambda: target.copy_(source), device, seconds).median


def peak_bytes(function: Callable[[], Any], device: str) -> int:
    """Most bytes alive during ``function`` beyond those before it.

    On CUDA the allocator's figure; on the CPU counted operator by operator, without what one takes and gives back.
    """
    function()
    if device == "cuda":
        release_device_memory()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with MemoryMeter() as meter:
        function()
    return meter.peak_bytes


def _cache_bytes(device: str) -> int:
    if device == "cuda":
        return max(2 * torch.cuda.get_device_properties().L2_cache_size, 1 << 28)
    return 1 << 26


def _time_cpu(function: Callable[[], Any], before: Callable[[], Any]) -> float:
    before()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start

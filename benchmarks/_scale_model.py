"""Time, traffic and memory of one training step on several ranks, on paper, for ``benchmarks/scale.py``.

All methods run on the same devices and links. A device reaches the same FLOP/s for every batch and every layer. Links
do not disturb each other. Only convolutions, matrix products and messages take time. The slow rank is where it costs
most.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from typing import NamedTuple, TypeVar

from auglocal_ext.distributed import balanced_cuts

FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes in which DistributedDataParallel averages gradients
ACCUMULATED = ", accumulated"  # how the name of a method ends whose step takes several calls
T = TypeVar("T")


@dataclass(frozen=True)
class Machine:
    """FLOP/s of a device, bytes/s of a link each way, seconds of a message, and how much slower one rank is."""

    flops: float
    bandwidth: float
    latency: float
    slow: float = 1.0

    def all_reduce(self, nbytes: float, ranks: int) -> float:
        """Seconds by recursive halving and doubling."""
        if ranks == 1:
            return 0.0
        return 2 * math.ceil(math.log2(ranks)) * self.latency + 2 * (ranks - 1) / ranks * nbytes / self.bandwidth


class Local(NamedTuple):
    """A local module in one step of a replica.

    Attributes:
        work: FLOPs.
        forward: those until its output can be sent.
        peak: bytes of activations and gradients while it runs.
        sends: bytes of its output, and of what later modules are supplied with.
        gradients: bytes that replicas average.
    """

    work: float
    forward: float
    peak: float
    sends: float
    gradients: float


class Layer(NamedTuple):
    """A layer in backpropagation, per image but for ``gradients``.

    Attributes:
        forward, inputs, weights: FLOPs of the forward pass, of the gradients of inputs and of weights.
        kept: bytes kept for the backward pass, output included.
        extra: bytes beyond them at the peak of its backward pass.
        sends: bytes of its output.
        gradients: bytes that replicas average.
    """

    forward: float
    inputs: float
    weights: float
    kept: float
    extra: float
    sends: float
    gradients: float

    @property
    def work(self) -> float:
        return self.forward + self.inputs + self.weights


class Run(NamedTuple):
    """A method in a steady state.

    Attributes:
        seconds: per batch.
        idle: share of them in which the busiest rank waits.
        fill: seconds until the first batch, or microbatch, reaches the last stage.
        traffic: bytes on all links per batch.
        peak: bytes of activations and gradients, on the rank with most of them.
    """

    method: str
    microbatches: int
    seconds: float
    idle: float
    fill: float
    traffic: float
    peak: float


def split(parts: Sequence[T], costs: Sequence[float], stages: int) -> list[Sequence[T]]:
    """The parts of each stage: as balanced as they can be."""
    if stages > len(parts):
        raise ValueError(f"{stages} stages need as many modules, and there are {len(parts)}")
    bounds = [0, *balanced_cuts(costs, stages), len(parts)]
    return [parts[start:stop] for start, stop in zip(bounds, bounds[1:], strict=False)]


def slowest(costs: Sequence[float], machine: Machine) -> list[float]:
    """FLOP/s of each stage: that with most work has the slow rank."""
    most = max(range(len(costs)), key=lambda stage: costs[stage])
    return [machine.flops / (machine.slow if stage == most else 1) for stage in range(len(costs))]


def local(modules: Sequence[Local], stages: int, replicas: int, calls: int, machine: Machine) -> Run:
    """``LocalStep``: features sent ahead of the backward pass, gradients averaged module by module.

    ``calls`` per batch, each with the work of ``modules``; with several, gradients are accumulated and kept.
    """
    parts = split(modules, [module.work for module in modules], stages)
    work = [sum(module.work for module in part) for part in parts]
    speeds = slowest(work, machine)
    averaging = [_averaging(part, replicas, speed, machine) for part, speed in zip(parts, speeds, strict=True)]
    times = [(calls - 1) * w / speed + last for w, speed, last in zip(work, speeds, averaging, strict=True)]
    links = [machine.latency + part[-1].sends / machine.bandwidth for part in parts[:-1]]
    seconds = max([*times, *(calls * link for link in links)])
    ahead = [sum(m.work for m in part[:-1]) + part[-1].forward for part in parts[:-1]]
    fill = sum(flops / speed for flops, speed in zip(ahead, speeds, strict=False)) + sum(links)
    busiest = calls * max(flops / speed for flops, speed in zip(work, speeds, strict=True))
    sent = [part[-1].sends for part in parts[:-1]]
    # Beside its module a stage holds what it has sent, and the place for the next batch.
    messages = [into + out for into, out in zip([0.0, *sent], [*sent, 0.0], strict=True)]
    gradients = [sum(module.gradients for module in part) for part in parts]
    if calls > 1:
        messages = [held + kept for held, kept in zip(messages, gradients, strict=True)]
    peak = max(max(m.peak for m in part) + held for part, held in zip(parts, messages, strict=True))
    traffic = replicas * calls * sum(sent) + 2 * (replicas - 1) * sum(gradients)
    name = "local" if calls == 1 else f"local{ACCUMULATED}"
    return Run(name, calls, seconds, max(0.0, 1 - busiest / seconds), fill, traffic, peak)


def _averaging(modules: Sequence[Local], replicas: int, speed: float, machine: Machine) -> float:
    """Gradients of a module travel while the next one runs, and have arrived before the one after it begins."""
    averaged = now = 0.0
    for module in modules:
        now = max(now + module.work / speed, averaged)
        averaged = now + machine.all_reduce(module.gradients, replicas)
    return averaged


def data_parallel(layers: Sequence[Layer], ranks: int, images: float, machine: Machine) -> Run:
    """Backpropagation with ``images`` per rank; gradients are averaged in DDP's buckets during the backward pass."""
    speed = machine.flops / machine.slow
    now = images * sum(layer.forward for layer in layers) / speed
    averaged, waiting, limit = 0.0, 0.0, FIRST_BUCKET
    for place, layer in reversed(list(enumerate(layers))):
        now += images * (layer.inputs + layer.weights) / speed
        waiting += layer.gradients
        if waiting >= limit or place == 0:
            averaged = max(now, averaged) + machine.all_reduce(waiting, ranks)
            waiting, limit = 0.0, BUCKET
    gradients = sum(layer.gradients for layer in layers)
    peak = images * _backward(layers) + gradients
    return Run("BP data parallel", 1, averaged, 1 - now / averaged, 0.0, 2 * (ranks - 1) * gradients, peak)


def _backward(layers: Sequence[Layer]) -> float:
    """Bytes of activations per image at the peak of a backward pass, which releases them layer by layer."""
    kept = itertools.accumulate(layer.kept for layer in layers)
    return max(held + layer.extra for held, layer in zip(kept, layers, strict=True))


def pipelined(
    layers: Sequence[Layer], stages: int, replicas: int, images: int, micro: int, machine: Machine, zero: bool
) -> Run:
    """Backpropagation over stages, with ``images`` per replica in ``micro`` microbatches: 1F1B or zero bubble.

    The schedules are PipeDream-Flush (Narayanan et al., ICML 2021) and ZB-H1 (Qi et al., ICLR 2024).
    """
    size = images / micro
    parts = split(layers, [layer.work for layer in layers], stages)
    speeds = slowest([sum(layer.work for layer in part) for part in parts], machine)
    seconds = [
        [size * sum(getattr(layer, kind) for layer in part) / speed for part, speed in zip(parts, speeds, strict=True)]
        for kind in ("forward", "inputs", "weights")
    ]
    sent = [size * part[-1].sends for part in parts[:-1]]
    links = [nbytes / machine.bandwidth for nbytes in sent]
    ends, fill, flying = simulate(*seconds, links, machine.latency, micro, zero)
    gradients = [sum(layer.gradients for layer in part) for part in parts]
    last = max(end + machine.all_reduce(nbytes, replicas) for end, nbytes in zip(ends, gradients, strict=True))
    busiest = micro * max(map(sum, zip(*seconds, strict=True)))
    # A stage keeps the input of every microbatch, and its output until the gradient comes.
    peak = 0.0
    for part, into, count, nbytes in zip(parts, [0.0, *sent], flying, gradients, strict=True):
        others = (count - 1) * size * sum(layer.kept for layer in part)
        peak = max(peak, others + size * _backward(part) + count * into + nbytes)
    traffic = 2 * replicas * micro * sum(sent) + 2 * (replicas - 1) * sum(gradients)
    return Run("BP zero bubble" if zero else "BP 1F1B", micro, last, 1 - busiest / last, fill, traffic, peak)


def simulate(
    forward: Sequence[float],
    inputs: Sequence[float],
    weights: Sequence[float],
    links: Sequence[float],
    latency: float,
    micro: int,
    zero: bool,
) -> tuple[list[float], float, list[int]]:
    """When each stage has ended, when the last has begun, and the most microbatches that each keeps.

    Stage s of S runs S - 1 - s forward passes, then a forward and a backward pass in turn. With ``zero`` a backward
    pass ends with the gradient of its input. Those of weights wait until the stage has nothing else to do, or keeps S
    microbatches.

    Args:
        forward, inputs, weights: seconds of each stage for a microbatch: forward pass, gradients of inputs and weights.
        links: seconds that a message occupies the link after each stage but the last; it arrives ``latency`` later.
    """
    stages = len(forward)
    warm = [min(micro, stages - 1 - stage) for stage in range(stages)]
    order = ["F" * n + "FB" * (micro - n) + "B" * n for n in warm]
    done = [{"F": 0, "B": 0, "W": 0} for _ in range(stages)]
    arrived = {("F", 0, i): 0.0 for i in range(micro)}
    free: dict[tuple[str, int], float] = {}
    ends, most, asleep, fill = [0.0] * stages, [0] * stages, set(), 0.0
    agenda = [(0.0, stage) for stage in range(stages)]
    heapify(agenda)
    while agenda:
        now, stage = heappop(agenda)
        count = done[stage]
        place = count["F"] + count["B"]
        kind = order[stage][place] if place < 2 * micro else ""
        ready = arrived.get((kind, stage, count[kind])) if kind else None
        full = kind == "F" and zero and count["F"] - count["W"] == stages
        if ready is not None and ready <= now and not full:
            now += forward[stage] if kind == "F" else inputs[stage] + (0 if zero else weights[stage])
            to = stage + 1 if kind == "F" else stage - 1
            if to == stages:
                arrived["B", stage, count["F"]] = now
                fill = fill or ready
            elif to >= 0:
                sent = max(now, free.get((kind, stage), 0.0)) + links[min(stage, to)]
                free[kind, stage] = sent
                arrived[kind, to, count[kind]] = sent + latency
                if to in asleep:
                    asleep.discard(to)
                    heappush(agenda, (sent + latency, to))
            count[kind] += 1
            count["W"] += kind == "B" and not zero
        elif count["W"] < count["B"]:
            now += weights[stage]
            count["W"] += 1
        elif not kind:
            ends[stage] = now
            continue
        elif ready is None:
            asleep.add(stage)
            continue
        else:
            now = ready
        most[stage] = max(most[stage], count["F"] - count["W"])
        heappush(agenda, (now, stage))
    return ends, fill, most

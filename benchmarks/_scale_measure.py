"""Real stages on gloo, for ``benchmarks/scale.py --measure``: each stage alone, the link, and the pipeline."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _scale_counts import build, local_modules, sgd
from _scale_model import Local, Machine, local
from torch import Tensor, multiprocessing
from torch.distributed.device_mesh import init_device_mesh

from auglocal_ext import LocalSequential, LocalStep
from auglocal_ext.distributed import balanced_cuts
from auglocal_ext.local_modules import OneStream, Relay
from auglocal_ext.step.optimizers import ModuleOptimizers
from auglocal_ext.step.updates import Updates, updating_pass

WARMUP = 5


@dataclass(frozen=True)
class Settings:
    """The network as :func:`_scale_counts.build` takes it; ``repeats`` runs of ``batches`` batches are timed."""

    network: str
    rule: str
    modules: int | None
    batch: int
    batches: int
    repeats: int


def measure(settings: Settings, stages: int) -> dict[str, Any]:
    """What ``stages`` processes measure, and what the model says with their times: seconds per batch, bytes."""
    counted = local_modules(settings.network, settings.rule, settings.modules, settings.batch)
    if stages > len(counted):
        raise ValueError(f"{stages} stages need as many modules, and there are {len(counted)}")
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("meeting", "result")]
        largest = int(max(module.sends for module in counted))
        multiprocessing.spawn(_enter, (stages, *paths, settings, largest), nprocs=stages)
        found = json.loads(Path(paths[1]).read_text())
    sends = [counted[cut - 1].sends for cut in found["cuts"]]
    alone = [sum(stage["alone"]) for stage in found["stages"]]
    sent = [stage["until_sent"] for stage in found["stages"]]
    parts = [Local(*times, 0.0, nbytes, 0.0) for *times, nbytes in zip(alone, sent, [*sends, 0], strict=True)]
    machine = Machine(1.0, found["bandwidth"], found["latency"])
    # Processes that share cores take turns.
    shared = sum(alone) / found["cores"]
    predicted, ideal = max(local(parts, stages, 1, 1, machine).seconds, shared), max(*alone, shared)
    return {"ranks": stages, **found, "sent_bytes": sends, "predicted": predicted, "ideal": ideal}


def _enter(rank: int, world: int, meeting: str, result: str, settings: Settings, largest: int) -> None:
    torch.set_num_threads(1)
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if len(available) >= world:
        os.sched_setaffinity(0, {available[rank]})
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    found = _measure(rank, world, settings, largest)
    if rank == 0:
        cores = {"cores": len(available) or os.cpu_count(), "pinned": len(available) >= world}
        Path(result).write_text(json.dumps({**cores, **found}))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads sometimes abort a process that tears them down on a busy machine


def _measure(rank: int, world: int, settings: Settings, largest: int) -> dict[str, Any]:
    net, batch = _start(settings)
    rounds = settings.batches
    whole = _in_turn([0], rank, lambda: _alone(net, 0, len(net.local_modules), batch, rounds)[0])
    told = [balanced_cuts(whole, world) if whole else None]
    torch.distributed.broadcast_object_list(told, 0)
    cuts = told[0]
    assert cuts is not None
    bounds = [0, *cuts, len(net.local_modules)]

    def stage() -> tuple[list[float], float]:
        return _alone(net, bounds[rank], bounds[rank + 1], batch, rounds)

    alone = _in_turn(range(world), rank, stage)
    torch.distributed.barrier()
    together = stage()
    latency, seconds = (_message(rank, nbytes, rounds) for nbytes in (1, largest))
    bandwidth = largest / max(seconds - latency, 1e-9)

    net, (x, y) = _start(settings)
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("stage",))
    step = LocalStep(net, sgd, mesh=mesh, stage_cuts=cuts)
    for _ in range(WARMUP + world):
        step(x, y)
    runs = []
    for _ in range(settings.repeats):
        begun = time.perf_counter()
        for _ in range(settings.batches):
            step(x, y)
        runs.append((time.perf_counter() - begun) / settings.batches)
    step.close()

    assert alone is not None
    ours = {"alone": alone[0], "until_sent": alone[1], "together": sum(together[0]), "runs": runs}
    stages: list[Any] = [None] * world
    torch.distributed.all_gather_object(stages, ours)
    link = {"latency": latency, "bandwidth": bandwidth}
    # The last stage has a batch behind it when all have.
    return {"cuts": cuts, "one_process": whole, "stages": stages, **link, "measured": stages[-1]["runs"]}


def _start(settings: Settings) -> tuple[LocalSequential, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    net = build(settings.network, settings.rule, settings.modules)
    x = torch.randn(settings.batch, *net.network.input_shape)
    return net, (x, net.task.example(settings.batch))


def _in_turn(ranks: Sequence[int], rank: int, work: Callable[[], Any]) -> Any:
    """What ``work`` gives this rank; the others wait meanwhile."""
    found = None
    for turn in ranks:
        torch.distributed.barrier()
        if turn == rank:
            found = work()
    torch.distributed.barrier()
    return found


def _alone(
    net: LocalSequential, first: int, stop: int, batch: tuple[Tensor, Tensor], rounds: int
) -> tuple[list[float], float]:
    """Median seconds of each local module from ``first`` on given inputs, and of all until the output can be sent."""
    (x, y), modules = batch, net.local_modules[first:stop]
    optimizers = ModuleOptimizers(modules, sgd, [p for module in modules for p in module.parameters()])
    updates = Updates(optimizers, None, None, "module", 1)
    before = Relay(net.local_modules, x)
    with torch.no_grad():
        for module in net.local_modules[:first]:
            before.through(module)
    found, sent = [], []
    for _ in range(WARMUP + rounds):
        clock, relay = _Clock(), Relay(modules, x)
        relay.h, relay.history = before.h, None if before.history is None else list(before.history)
        optimizers.prepare()
        updating_pass(modules, x, y, updates, None, clock, relay)
        updates.count()
        times = [*clock.begun, time.perf_counter()]
        found.append([end - begun for begun, end in zip(times, times[1:], strict=False)])
        sent.append(clock.sent - times[0])
    return [statistics.median(times) for times in zip(*found[WARMUP:], strict=True)], statistics.median(sent[WARMUP:])


class _Clock(OneStream):
    """Notes when each module begins, and when the last has its output."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.sent = 0.0

    def module(self, index: int) -> Any:
        self.begun.append(time.perf_counter())
        return super().module(index)

    def handed_on(self, index: int, h: Tensor, history: Sequence[Tensor | None]) -> None:
        self.sent = time.perf_counter()


def _message(rank: int, nbytes: int, rounds: int) -> float:
    """Median seconds of a message between the first two ranks: half of there and back."""
    message, seconds = torch.zeros(nbytes, dtype=torch.uint8), []
    for _ in range(WARMUP + rounds if rank < 2 else 0):
        begun = time.perf_counter()
        for sender in (0, 1):
            if rank == sender:
                torch.distributed.send(message, 1 - rank)
            else:
                torch.distributed.recv(message, 1 - rank)
        seconds.append((time.perf_counter() - begun) / 2)
    torch.distributed.barrier()
    return statistics.median(seconds[WARMUP:]) if rank < 2 else 0.0

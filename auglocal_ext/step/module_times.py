"""How long each local module takes in a training step, measured on this device."""

from __future__ import annotations

import statistics
import time
from contextlib import AbstractContextManager
from typing import Any

import torch

from .._torch import FakeTensor
from ..local_modules import OneStream, Recompute
from ..local_sequential import LocalSequential
from .empty_batch import empty_batch
from .fake_copy import DataCopy
from .optimizers import ModuleOptimizers, OptimizerFactory
from .updates import Clip, Updates, updating_pass

WARMUP, ROUNDS = 2, 5


def module_times(
    net: LocalSequential,
    batch_size: int,
    optimizer: OptimizerFactory,
    *,
    params: list[Any],
    autocast: torch.dtype | None,
    clip_norm: float | None,
    clip: Clip,
    accumulate: int,
    recompute: Recompute | None,
) -> list[float]:
    """Seconds per batch of each local module in a training step, the medians of five steps after two.

    A copy of the network on its device makes the steps, with an optimizer of its own, on a batch of random inputs.
    Weights, buffers and random state are left alone. Messages between processes are not part of it.

    Args:
        net: the network.
        batch_size: images per call.
        optimizer, params, autocast, clip_norm, clip, accumulate, recompute: as :class:`auglocal_ext.LocalStep` has
            them.

    Raises:
        ValueError: for a network without values, on the meta device or of fake tensors.
    """
    tensors = [*net.parameters(), *net.buffers()]
    if net.empty or any(tensor.is_meta or _is_fake(tensor) for tensor in tensors):
        raise ValueError(
            'Balanced(by="time") measures steps of the whole network in the first process, and this network has no '
            "values there (built inside deferred, or on the meta device): name the cuts, or take "
            'Balanced(by="flops")'
        )
    device = tensors[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        copied = DataCopy(net)
        if recompute is not None:
            copied.net.recompute = recompute
        modules = copied.net.local_modules
        optimizers = ModuleOptimizers(modules, optimizer, copied.groups(params))
        calls = min(accumulate, 2)  # of more calls than two, all but the last are alike
        updates = Updates(optimizers, None, clip_norm, clip, calls)
        x, y = empty_batch(net, batch_size)
        x = x.to(device)
        if x.is_floating_point():
            x.normal_(generator=torch.Generator(device).manual_seed(0))
        else:
            x.zero_()
        y = y.to(device)
        clocks = []
        for _ in range((WARMUP + ROUNDS) * calls):
            optimizers.prepare()
            clocks.append(_Clock(device))
            updating_pass(modules, x, y, updates, autocast, clocks[-1])
            updates.count()
    timed = [clock.seconds for clock in clocks[WARMUP * calls :]]
    last = [statistics.median(module) for module in zip(*timed[calls - 1 :: calls], strict=True)]
    if calls == 1:
        return last
    others = [statistics.median(module) for module in zip(*timed[::calls], strict=True)]
    return [(o * (accumulate - 1) + f) / accumulate for o, f in zip(others, last, strict=True)]


class _Clock(OneStream):
    """Notes when each module begins, and when the pass ends."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begins: list[float] = []

    def module(self, index: int) -> AbstractContextManager[Any]:
        self._note()
        return super().module(index)

    def join(self) -> None:
        self._note()

    def _note(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._begins.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self._begins, self._begins[1:], strict=False)]


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)

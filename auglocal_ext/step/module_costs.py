"""What each local module of a training step costs: its FLOPs, counted on fake tensors, or its seconds on this device.

Stages are balanced by it. A copy of the network makes the steps, so weights, buffers and random state are left alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from .._torch import DataDependentOutputException, FakeTensor
from ..cost import FlopMeter
from ..local_modules import OneStream, Recompute
from ..local_sequential import LocalSequential
from ..memory.copies import DataCopy, FakeCopy, fake_mode_of
from ..partition import Balanced
from .empty_batch import empty_batch, explained_targets
from .optimizers import ModuleOptimizers, OptimizerFactory
from .parameter_lists import named_parameters
from .updates import Clip, Updates, updating_pass

WARMUP, ROUNDS = 2, 5


def module_flops(
    net: LocalSequential, optimizer: OptimizerFactory, recompute: Recompute | Sequence[Recompute] | None = None
) -> list[int]:
    """FLOPs of each local module in a training step, optimizer included, counted on fake tensors for two samples.

    Fake tensors have no values. An optimizer that reads some back is counted as SGD.

    Args:
        net: the network, on any device, or built of fake tensors.
        optimizer: makes the optimizer of a list of parameters.
        recompute: None for that of ``net``.

    Raises:
        ValueError: if the network reads values back.
    """
    try:
        return _flops(net, optimizer, recompute)
    except DataDependentOutputException:  # by the network or by the optimizer: ASGD and Adafactor read values back
        pass
    try:
        return _flops(net, torch.optim.SGD, recompute)
    except DataDependentOutputException as error:
        raise ValueError(
            f"FLOPs are counted without data, and the network reads values of tensors back ({error}): name the cuts, "
            'such as stage_cuts=(4, 9), or balance measured time, Balanced(by="time", batch_size=64)'
        ) from error


def costs_of_stages(
    net: LocalSequential,
    optimizer: OptimizerFactory,
    balanced: Balanced,
    *,
    recompute: Recompute | Sequence[Recompute] | None,
    options: dict[str, Any],
) -> Sequence[float]:
    """FLOPs of each local module, or its seconds; ``options`` are those of the step, ``params`` among them by name."""
    if balanced.by == "flops":
        return module_flops(net, optimizer, recompute)
    assert balanced.batch_size is not None
    options = {**options, "params": named_parameters(net, options["params"])}
    return module_times(net, balanced.batch_size, optimizer, recompute=recompute, **options)


def _flops(
    net: LocalSequential, optimizer: OptimizerFactory, recompute: Recompute | Sequence[Recompute] | None
) -> list[int]:
    with fake_mode_of(net):
        copied = FakeCopy(net).net
        if recompute is not None:
            copied.recompute = recompute
        optimizers = ModuleOptimizers(copied.local_modules, optimizer, list(copied.parameters()))
        step_on_cpu(optimizers.whole)
        updates = Updates(optimizers, None, None, "module", 1)
        x, y = empty_batch(copied, 2)
        counts: list[int] = []
        for _ in range(2):  # the first step of some optimizers only makes their state
            with FlopMeter() as meter, explained_targets(copied.task, y, "FLOPs are counted"):
                counts = _step(copied, x, y, optimizers, updates, None, lambda: meter.flops)
    return counts


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
    recompute: Recompute | Sequence[Recompute] | None,
) -> list[float]:
    """Seconds per batch of each local module in a training step, the medians of five steps after two.

    A copy of the network on its device makes the steps, with an optimizer of its own, on a batch of random inputs.
    Messages between processes are not part of it.

    Args:
        net: the network.
        batch_size: images per call.
        optimizer, params, autocast, clip_norm, clip, accumulate, recompute: as :class:`auglocal_ext.LocalStep` has
            them.

    Raises:
        ValueError: for a network without values, on the meta device or of fake tensors.
    """
    tensors = [*net.parameters(), *net.buffers()]
    if net.empty or any(tensor.is_meta or isinstance(tensor, FakeTensor) for tensor in tensors):
        raise ValueError(
            'Balanced(by="time") measures steps of the whole network in the first process, and this network has no '
            "values there (built inside deferred, or on the meta device): name the cuts, or take "
            'Balanced(by="flops")'
        )
    device = tensors[0].device

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        copied = DataCopy(net)
        if recompute is not None:
            copied.net.recompute = recompute
        optimizers = ModuleOptimizers(copied.net.local_modules, optimizer, copied.groups(params))
        calls = min(accumulate, 2)  # of more calls than two, all but the last are alike
        updates = Updates(optimizers, None, clip_norm, clip, calls)
        x, y = empty_batch(net, batch_size)
        x = x.to(device)
        if x.is_floating_point():
            x.normal_(generator=torch.Generator(device).manual_seed(0))
        else:
            x.zero_()
        y = y.to(device)
        rounds = [_step(copied.net, x, y, optimizers, updates, autocast, now) for _ in range((WARMUP + ROUNDS) * calls)]
    timed = rounds[WARMUP * calls :]
    last = [statistics.median(module) for module in zip(*timed[calls - 1 :: calls], strict=True)]
    if calls == 1:
        return last
    others = [statistics.median(module) for module in zip(*timed[::calls], strict=True)]
    return [(o * (accumulate - 1) + f) / accumulate for o, f in zip(others, last, strict=True)]


def step_on_cpu(optimizer: torch.optim.Optimizer) -> None:
    """Turn off what only CUDA has, for a step on fake CPU tensors."""
    for options in (optimizer.defaults, *optimizer.param_groups):
        for key in ("capturable", "fused"):
            if options.get(key):
                options[key] = False


def _step(
    net: LocalSequential,
    x: Tensor,
    y: Tensor,
    optimizers: ModuleOptimizers,
    updates: Updates,
    autocast: torch.dtype | None,
    read: Callable[[], Any],
) -> list[Any]:
    """A step; by how much ``read()`` has grown in each local module."""
    reader = _Reader(read)
    optimizers.prepare()
    updating_pass(net.local_modules, x, y, updates, autocast, reader)
    updates.count()
    return reader.differences()


class _Reader(OneStream):
    """Reads something where each module begins, and where the pass ends."""

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read = read
        self._readings: list[Any] = []

    def module(self, index: int) -> AbstractContextManager[Any]:
        self._readings.append(self._read())
        return super().module(index)

    def join(self) -> None:
        self._readings.append(self._read())

    def differences(self) -> list[Any]:
        readings: Sequence[Any] = self._readings
        return [after - before for before, after in zip(readings, readings[1:], strict=False)]

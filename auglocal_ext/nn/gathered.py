"""Losses that compare the samples of a batch whose parts lie in several processes: features gathered from all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .waiting import waiting_for


@dataclass(frozen=True)
class _Spread:
    """A batch over the processes of a group: how many samples each has, and where this process is."""

    group: Any
    sizes: tuple[int, ...]
    where: str

    @property
    def first(self) -> int:
        return sum(self.sizes[: torch.distributed.get_rank(self.group)])

    def collected(self, rows: Tensor) -> Tensor:
        """The rows of all processes, in order of rank."""
        largest = max(self.sizes)
        own = rows.new_zeros(largest, *rows.shape[1:])
        own[: len(rows)] = rows
        parts = [torch.empty_like(own) for _ in self.sizes]
        with waiting_for("the features of a batch were not gathered", self.where):
            torch.distributed.all_gather(parts, own, group=self.group)
        return torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])


_active: _Spread | None = None


class _Gathered(torch.autograd.Function):
    """The features of all R processes.

    All compute the same loss L(f_1 .. f_R). Process r returns R dL/df_r, and averaging over processes divides by R:
    (1/R) sum_r R dL/df_r df_r/dw = dL/dw, the gradient of one process with the whole batch.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, spread: _Spread) -> Tensor:
        ctx.spread, ctx.rows = spread, len(features)
        return spread.collected(features)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        spread = ctx.spread
        return grad[spread.first :][: ctx.rows] * len(spread.sizes), None


def gathering() -> bool:
    """Whether :func:`gathered` gathers anything."""
    return _active is not None


def gathered(features: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Features and targets of all processes within :func:`gathered_features`; elsewhere the arguments themselves.

    For a loss of your own that compares the samples of a batch. Its :class:`auglocal_ext.auxiliary.Part` or task says
    ``compares_samples = True``.

    Args:
        features: ``(N, ...)``, one row per sample; rows have the same shape in all processes, N may differ.
        target: ``(N, ...)``, without gradient.
    """
    if _active is None:
        return features, target
    return _Gathered.apply(features, _active), _active.collected(target)


@contextmanager
def gathered_features(group: Any, samples: int, hosts: Any = None, where: str = "") -> Iterator[None]:
    """Within it losses that compare samples (PredSim's, InfoPro's contrast) see those of all processes of ``group``.

    All processes compute the same loss of the whole batch. The gradients are right once they are averaged over the
    processes, as :class:`auglocal_ext.LocalStep` does. Every process must run the same losses in the same order.

    Args:
        group: the process group.
        samples: of this process; others may have more or fewer.
        hosts: a group of the same processes for tensors on the CPU, where ``group`` has none.
        where: names this process in messages.
    """
    global _active
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(torch.distributed.get_world_size(group))]
    with waiting_for("the sizes of the parts of a batch were not exchanged", where):
        torch.distributed.all_gather(sizes, torch.tensor([samples]), group=group if hosts is None else hosts)
    before, _active = _active, _Spread(group, tuple(map(int, sizes)), where)
    try:
        yield
    finally:
        _active = before

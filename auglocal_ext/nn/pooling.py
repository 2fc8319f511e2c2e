"""Global average pooling whose gradient is never made as a map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fusable import must_be_eager


def _mean_over_positions(x: Tensor) -> Tensor:
    return x.mean(dim=tuple(range(2, x.dim())))


class _GlobalAveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.shape = x.shape
        return _mean_over_positions(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        positions = ctx.shape[2:].numel()
        return (grad / positions).reshape(*grad.shape, *(1 for _ in ctx.shape[2:])).expand(ctx.shape)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return _mean_over_positions(tangent)


def global_average_pool(x: Tensor) -> Tensor:
    """mean over positions(x): ``(N, C, *positions) -> (N, C)``; an x of (N, C) is returned as it is.

    The gradient is the (N, C) gradient expanded over the positions (stride 0); torch's own pooling writes and keeps a
    whole map. Differentiable any number of times.
    """
    if x.dim() <= 2:
        return x
    return _mean_over_positions(x) if must_be_eager(x) else _GlobalAveragePool.apply(x)

"""Global average pooling whose gradient is never made as a map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _GlobalAveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.shape = h.shape
        return h.flatten(2).mean(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        positions = ctx.shape[2:].numel()
        return (grad / positions).reshape(*grad.shape, *(1 for _ in ctx.shape[2:])).expand(ctx.shape)


def global_average_pool(h: Tensor) -> Tensor:
    """``mean over positions``: ``(N, C, *positions) -> (N, C)``; a ``(N, C)`` input is returned as it is.

    The gradient is the [N, C] gradient expanded over positions (stride 0), where torch's own pooling writes and
    holds a whole map.
    """
    return _GlobalAveragePool.apply(h) if h.dim() > 2 else h

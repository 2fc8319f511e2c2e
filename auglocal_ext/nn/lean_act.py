"""Activations before a linear layer, which keep their raw input alone: GELU, and the gate of SwiGLU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.registry import refuse_create_graph
from .norm_act import PLAIN
from .remade import Source, recordable

_silu_backward = torch.ops.aten.silu_backward.default


def lean_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """``F.gelu(x, approximate=approximate)`` with a source. torch's node keeps x, and nothing else is needed."""
    y = F.gelu(x, approximate=approximate)
    if y.requires_grad and recordable(x):
        Source(partial(_gelu_again, approximate=approximate), (x,)).note(y)
    return y


def _gelu_again(tensors: Sequence[Any], approximate: str) -> Tensor:
    return F.gelu(tensors[0], approximate=approximate)


class FusedGELU(nn.GELU):
    """An ``nn.GELU`` that :func:`auglocal_ext.fuse` has changed."""

    def forward(self, input: Tensor) -> Tensor:
        return lean_gelu(input, self.approximate)


def gated(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """``silu(gate) * up``, of which gate and up alone are kept, with a source; without ``up`` of gate's halves.

    gate and up (..., C), or gate (..., 2 C). Differentiable once; what has to run eagerly is torch's.
    """
    if recordable(gate, up) and (up is None or up.dtype == gate.dtype and up.shape == gate.shape):
        y: Tensor = _Gated.apply(gate, up)
        return Source(_gated_again, (gate, up)).note(y) if y.requires_grad else y
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return F.silu(gate) * up


def _gated_again(tensors: Sequence[Any]) -> Tensor:
    gate, up = tensors
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    return F.silu(gate).mul_(up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate, up)
        return _gated_again((gate, up))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_create_graph("a fused SwiGLU", PLAIN)
        if grad is None:
            return None, None
        gate, up = ctx.saved_tensors
        if up is not None:
            need_gate, need_up = ctx.needs_input_grad
            return (
                _silu_backward(grad * up, gate) if need_gate else None,
                F.silu(gate).mul_(grad) if need_up else None,
            )
        both = torch.empty_like(gate, memory_format=torch.contiguous_format)
        (gate, up), (grad_gate, grad_up) = gate.chunk(2, -1), both.chunk(2, -1)
        grad_gate.copy_(_silu_backward(grad * up, gate))
        torch.mul(F.silu(gate), grad, out=grad_up)
        return both, None

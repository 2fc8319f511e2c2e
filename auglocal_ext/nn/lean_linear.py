"""A linear layer that keeps what its input was made from in place of the input."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.registry import refuse_create_graph
from .norm_act import PLAIN
from .remade import Once, Remake, Source, autocast_dtype, autocasts, recordable, source_of

_AS_IT_IS = nullcontext()


def readable(y: Tensor, weight: Tensor, bias: Tensor | None) -> Source | None:
    """The source from which the weight's gradient can be made; None where ``F.linear`` keeps no more, or must run."""
    if torch.compiler.is_compiling():
        return None
    source = source_of(y)
    if source is None or not weight.requires_grad or not recordable(y, weight, bias):
        return None
    if (weight.dtype == torch.float64) != (y.dtype == torch.float64):  # which torch refuses, autocast or not
        return None
    return source


def lean_linear(source: Source, y: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool = False) -> Tensor:
    """``F.linear(y, weight, bias)`` of a ``y`` with this source; ``transposed``: of ``weight.T``.

    Under autocast its casts are made by hand and made again in backward: neither is the cast of y kept, nor does the
    weight's go into autocast's cache.
    """
    source.once.readers += 1
    # In a tuple: they are saved, and no gradient goes to them.
    how = source.remake, source.once, transposed, autocast_dtype(y)
    out: Tensor = _LeanLinear.apply(y, weight, bias, source.tensors, how)
    return out.view(*y.shape[:-1], out.shape[-1])  # a view of torch's own, which may be written to


class _LeanLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        made_from: tuple[Tensor | None, ...],
        how: tuple[Remake, Once, bool, torch.dtype | None],
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        *_, transposed, autocast = how
        ctx.how = how
        ctx.described = y.shape, y.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(weight, *made_from)
        if autocast is not None:
            y, weight = y.to(autocast), weight.to(autocast)
            bias = None if bias is None else bias.to(autocast)
        return nn.functional.linear(y.reshape(-1, y.shape[-1]), weight.t() if transposed else weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_create_graph("a linear layer after a fused normalisation or activation", PLAIN)
        remake, once, transposed, autocast = ctx.how
        weight, *made_from = ctx.saved_tensors
        if grad is None:
            return (None,) * 5
        need_y, need_weight, need_bias = ctx.needs_input_grad[:3]
        shape, y_dtype, bias_dtype = ctx.described
        dtype = grad.dtype if autocast is None else autocast
        device = grad.device.type
        # The dtypes are those of the forward pass, whatever autocast is around the call of backward.
        with torch.autocast(device, enabled=False) if autocasts(device) else _AS_IT_IS:
            grad_y = grad_weight = grad_bias = None
            if need_weight:
                y = once.take(remake, made_from)
                y = y.reshape(-1, y.shape[-1]).to(dtype)
                grad_weight = (y.t() @ grad if transposed else grad.t() @ y).to(weight.dtype)
                del y
            if need_bias:
                grad_bias = grad.sum(0).to(bias_dtype)
            if need_y:
                cast = weight.to(dtype)
                grad_y = (grad @ (cast.t() if transposed else cast)).to(y_dtype).view(shape)
        return grad_y, grad_weight, grad_bias, None, None


def linear(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(y, weight, bias)``, which keeps the source of ``y`` in its place where there is one."""
    source = readable(y, weight, bias)
    return nn.functional.linear(y, weight, bias) if source is None else lean_linear(source, y, weight, bias)


class FusedLinear(nn.Linear):
    """An ``nn.Linear`` that :func:`auglocal_ext.fuse` has changed."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)

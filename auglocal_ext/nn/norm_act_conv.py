"""Normalisation, activation and the convolution after them as one autograd node that saves the raw map alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import batch_norm_act_apply, batch_norm_act_input_grad, batch_norm_act_reduce, batch_norm_factors
from ..ops.registry import refuse_create_graph

#: What has the second derivatives that the fused nodes have not.
PLAIN = "the plain module, to which auglocal_ext.unfuse(module) takes it back"


def norm_act_conv(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    provider: str | None = None,
) -> Tensor:
    """conv(act(bn(x) + residual)), of which only x and the (C,) vectors (and the caller's residual) are kept.

    x (N, C, *positions) in float16, bfloat16, float32 or float64, any strides. The arguments up to ``running_var``
    and from ``residual`` to ``negative_slope`` are those of :func:`auglocal_ext.ops.batch_norm_act`, the others those
    of ``F.conv2d`` (one number per position dimension). The normalised map lives while the convolution runs; backward
    makes it again and lets go of it before the gradient of x is made. The convolution and its gradients are the
    library's. Under autocast it runs in autocast's dtype as ``F.conv2d`` does; no cast of a weight is kept.

    Differentiable once. Raises ValueError for vectors that do not fit x and, as torch does, for one value per channel
    in training; RuntimeError for ``create_graph=True``.
    """
    check_vectors(x, weight, bias, running_mean, running_var)
    mean, rstd = batch_norm_factors(
        x.detach(), running_mean, running_var, training=training, momentum=momentum, eps=eps, provider=provider
    )
    norm = Norm(activation, negative_slope, training, provider)
    conv = _Conv(tuple(stride), tuple(padding), tuple(dilation), groups)
    return _NormActConv.apply(x, weight, bias, residual, conv_weight, conv_bias, mean, rstd, norm, conv)


#: x, mean, rstd, weight, bias, residual, as the passes of ``batch_norm_act`` take them.
Factors = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class Norm(NamedTuple):
    """What the passes of ``batch_norm_act`` are told besides tensors."""

    activation: str
    negative_slope: float
    training: bool
    provider: str | None


class _Conv(NamedTuple):
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.aten.convolution(x, weight, bias, *self._arguments())

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, biases: list[int], mask: list[bool]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        return torch.ops.aten.convolution_backward(grad, x, weight, biases, *self._arguments(), mask)

    def _arguments(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, False, (0,) * len(self.stride), self.groups


def check_vectors(x: Tensor, *vectors: Tensor | None) -> None:
    """Raises ValueError unless each per-channel tensor is (C,) for x (N, C, ...) and on its device."""
    for vector in vectors:
        if vector is not None and (vector.shape != x.shape[1:2] or vector.device != x.device):
            raise ValueError(
                f"expected weight, bias and running statistics of shape ({x.shape[1]},) on {x.device} for x "
                f"{tuple(x.shape)}, got {tuple(vector.shape)} on {vector.device}"
            )


def input_grads(
    grad: Tensor,
    factors: Factors,
    norm: Norm,
    needed: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and residual of act(bn(x) + residual), those that are needed.

    ``grad`` of the result in x's dtype, any strides.
    """
    need_x, need_weight, need_bias, need_residual = needed
    weight, bias = factors[3:5]
    act, slope, training, provider = norm
    grad_x = grad_weight = grad_bias = grad_residual = None
    sums: tuple[Tensor | None, Tensor | None] = (None, None)
    if (need_x and training) or need_weight or need_bias:
        sums = sum_g, sum_g_xhat = batch_norm_act_reduce(grad, *factors, act, slope, provider=provider)
        grad_weight = sum_g_xhat.to(weight.dtype) if need_weight and weight is not None else None
        grad_bias = sum_g.to(bias.dtype) if need_bias and bias is not None else None
    if need_x or need_residual:
        # Where the residual's alone is needed, x's is made without sums, the cheapest way, and dropped.
        training = training and need_x
        grad_x, grad_residual = batch_norm_act_input_grad(
            grad, *factors, act, slope, *sums, training, need_residual, provider=provider
        )
    return grad_x if need_x else None, grad_weight, grad_bias, grad_residual


def normalised(factors: Factors, norm: Norm) -> Tensor:
    """act(bn(x) + residual)."""
    return batch_norm_act_apply(*factors, norm.activation, norm.negative_slope, provider=norm.provider)


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype autocast makes ``F.conv2d`` compute in; None where it is off or, as for float64, leaves x alone."""
    device = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


class _NormActConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        norm: Norm,
        conv: _Conv,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.norm, ctx.conv = norm, conv
        ctx.bias_dtype = None if conv_bias is None else conv_bias.dtype
        ctx.save_for_backward(x, mean, rstd, weight, bias, residual, conv_weight)
        autocast = _autocast_dtype(x)
        ctx.dtypes = autocast or x.dtype, autocast or conv_weight.dtype
        # Casts are made by hand: autocast's own would go into its weight cache, made here without a graph.
        a = normalised((x, mean, rstd, weight, bias, residual), norm).to(ctx.dtypes[0])
        biases = conv_bias if conv_bias is None or autocast is None else conv_bias.to(autocast)
        return conv.forward(a, conv_weight.to(ctx.dtypes[1]), biases)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_create_graph("norm_act_conv", PLAIN)
        grads: list[Tensor | None] = [None] * 10
        if grad is None:
            return tuple(grads)
        saved = ctx.saved_tensors  # once: hooks on saved tensors may fetch them from elsewhere
        x, factors, conv_weight = saved[0], saved[:6], saved[6]
        *needed, need_conv_weight, need_conv_bias = ctx.needs_input_grad[:6]
        # Without a weight gradient the convolution's backward reads no more of its input than the shape.
        input_dtype, weight_dtype = ctx.dtypes
        reads_input = need_conv_weight or x.dtype != input_dtype
        grad, grads[4], grads[5] = ctx.conv.backward(
            grad,
            normalised(factors, ctx.norm).to(input_dtype) if reads_input else x,
            conv_weight.to(weight_dtype),
            None if ctx.bias_dtype is None else [conv_weight.shape[0]],
            [any(needed), need_conv_weight, need_conv_bias],
        )
        if grads[4] is not None:
            grads[4] = grads[4].to(conv_weight.dtype)
        if grads[5] is not None:
            grads[5] = grads[5].to(ctx.bias_dtype)
        if grad is not None:
            grads[:4] = input_grads(grad.to(x.dtype), factors, ctx.norm, tuple(needed))
        return tuple(grads)

"""Normalisation, activation and the convolution after them as one autograd node that saves the raw map alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.batch_norm_checks import check_eps, check_map, slope_of
from ..ops.batch_norm_passes import Passes, passes
from ..ops.registry import refuse_create_graph
from ..ops.transforms import refuse_transforms
from .fusable import ConvCall, NormCall
from .norm_act import PLAIN, count_as_updated, input_grads, normalised

_convolution_backward = torch.ops.aten.convolution_backward.default


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
    num_batches_tracked: Tensor | None = None,
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
    library's. Under autocast it runs in autocast's dtype as ``F.conv2d`` does; its weight is cast once, and the cast
    kept for backward.

    Differentiable once. Raises ValueError for vectors that do not fit x and, as torch does, for one value per channel
    in training; RuntimeError for ``create_graph=True``; NotImplementedError under ``torch.func`` and for tensors with a
    tangent of forward-mode AD.
    """
    refuse_transforms("norm_act_conv", PLAIN, x, weight, bias, residual, conv_weight, conv_bias)
    check_map(x)
    check_eps(eps, training)
    norm = (weight, bias, running_mean, running_var, num_batches_tracked, training, float(momentum), float(eps), None)
    how = tuple(stride), tuple(padding), tuple(dilation), False, (0,) * len(stride), groups
    run = passes(x, provider)
    count_as_updated([norm])
    conv = conv_weight, conv_bias, how
    return norm_act_conv_call(run, x, norm, slope_of(activation, negative_slope), conv, run.autocast_dtype(), residual)


def norm_act_conv_call(
    run: Passes,
    x: Tensor,
    norm: NormCall,
    slope: float,
    conv: ConvCall,
    autocast: torch.dtype | None,
    residual: Tensor | None = None,
) -> Tensor:
    """:func:`norm_act_conv` of an x with elements, as modules call it, which have called ``count_as_updated``."""
    weight, bias, how = conv
    return _NormActConv.apply(x, norm[0], norm[1], residual, weight, bias, (run, slope, norm, how, autocast))


#: The passes, the activation's slope, the normalisation, the convolution's arguments after its tensors, autocast's
#: dtype.
_Options = tuple[Passes, float, NormCall, tuple[Any, ...], torch.dtype | None]


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
        options: _Options,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        run, slope, norm, how, autocast = options
        ctx.options = (run, slope, norm[5]), how, conv_weight.dtype, None if conv_bias is None else conv_bias.dtype
        a, mean, rstd = normalised(run, x, norm, slope, residual)
        if autocast is not None:
            # By hand: autocast's own casts would go into its weight cache, made here without a graph.
            a, conv_weight = a.to(autocast), conv_weight.to(autocast)
            conv_bias = None if conv_bias is None else conv_bias.to(autocast)
        ctx.save_for_backward(x, mean, rstd, weight, bias, residual, conv_weight)
        return torch.convolution(a, conv_weight, conv_bias, *how)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_create_graph("norm_act_conv", PLAIN)
        if grad is None:
            return (None,) * 7
        norm, how, weight_dtype, bias_dtype = ctx.options
        *factors, conv_weight = ctx.saved_tensors  # once: hooks on saved tensors may fetch them from elsewhere
        x, dtype = factors[0], conv_weight.dtype
        *needed, need_conv_weight, need_conv_bias = ctx.needs_input_grad[:6]
        a = x
        # Without a weight gradient the convolution's backward reads no more of its input than the shape.
        if need_conv_weight or x.dtype is not dtype:
            run, slope, _ = norm
            a = run.apply(*factors, slope)
            if a.dtype is not dtype:
                a = a.to(dtype)
        grad, grad_conv_weight, grad_conv_bias = _convolution_backward(
            *(grad, a, conv_weight, None if bias_dtype is None else [conv_weight.shape[0]]),
            *(*how, (True in needed, need_conv_weight, need_conv_bias)),
        )
        del a
        if need_conv_weight and weight_dtype is not dtype:
            grad_conv_weight = grad_conv_weight.to(weight_dtype)
        if need_conv_bias and bias_dtype is not dtype:
            grad_conv_bias = grad_conv_bias.to(bias_dtype)
        grads: tuple[Tensor | None, ...] = (None,) * 4
        if grad is not None:
            grads = input_grads(grad if grad.dtype is x.dtype else grad.to(x.dtype), factors, norm, needed)
        return *grads, grad_conv_weight, grad_conv_bias, None

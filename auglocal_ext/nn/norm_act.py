"""Normalisation, residual and activation as one autograd node, and what the nodes of this folder share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.batch_norm_act import Passes, count_as_written
from ..ops.registry import refuse_create_graph
from .fusable import NormCall, counted

#: What has the second derivatives that the fused nodes have not.
PLAIN = "the plain module, to which auglocal_ext.unfuse(module) takes it back"


def norm_act_call(run: Passes, x: Tensor, norm: NormCall, slope: float, residual: Tensor | None = None) -> Tensor:
    """:func:`auglocal_ext.ops.batch_norm_act` of an x with elements, as modules call it.

    The node of the op itself, which torch builds for tracers too, takes the host three times as long.
    """
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"expected residual {tuple(x.shape)} as x, got {tuple(residual.shape)}")
    mean, rstd = factors(run, x, norm)
    return _NormAct.apply(x, norm[0], norm[1], residual, mean, rstd, (run, slope, norm[5]))


#: What the passes of ``batch_norm_act`` are told besides tensors, after the passes: slope, and training.
Norm = tuple[Passes, float, bool]


def count_as_updated(norms: Iterable[NormCall]) -> None:
    """Tell autograd that the running statistics of ``norms`` will be updated, at once for all of them."""
    count_as_written(*[tensor for norm in norms if norm[5] for tensor in norm[2:5]])


def factors(run: Passes, x: Tensor, norm: NormCall) -> tuple[Tensor, Tensor]:
    """mean and rstd of x, and the running statistics updated; ValueError for vectors that do not fit x."""
    *vectors, batches, training, momentum, eps, fit = norm
    if fit is None or x.size(1) != fit.channels or x.device != fit.device:
        _check(x, vectors)
    elif training and momentum is not None and fit.dtype is run.wide and x.numel() > fit.channels:
        return run.factors_(x.detach(), norm[2], norm[3], batches, momentum, eps)
    return run.factors(x.detach(), *counted(norm)[2:8])


def _check(x: Tensor, vectors: Iterable[Any]) -> None:
    for vector in vectors:
        if vector is not None and (vector.shape != x.shape[1:2] or vector.device != x.device):
            raise ValueError(
                f"expected weight, bias and running statistics of shape ({x.shape[1]},) on {x.device} for x "
                f"{tuple(x.shape)}, got {tuple(vector.shape)} on {vector.device}"
            )


def input_grads(
    grad: Tensor, factors: Sequence[Any], norm: Norm, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight, bias and residual of act(bn(x) + residual), those that are needed.

    ``grad`` of the result in x's dtype, any strides; ``factors`` x, mean, rstd, weight, bias and residual.
    """
    need_x, need_weight, need_bias, need_residual = needed
    run, slope, training = norm
    grad_x = grad_weight = grad_bias = grad_residual = sum_g = sum_g_xhat = None
    if (need_x and training) or need_weight or need_bias:
        sum_g, sum_g_xhat = run.reduce(grad, *factors, slope)
        if need_weight:
            dtype = factors[3].dtype
            grad_weight = sum_g_xhat if sum_g_xhat.dtype is dtype else sum_g_xhat.to(dtype)
        if need_bias:
            dtype = factors[4].dtype
            grad_bias = sum_g if sum_g.dtype is dtype else sum_g.to(dtype)
    if need_residual and slope == 1:
        grad_residual, need_residual = grad, False
    if need_x or need_residual:
        if not (training and need_x):  # where the residual's alone is needed, x's is made the cheapest way, and dropped
            sum_g = sum_g_xhat = None
        grad_x, made = run.input_grad(grad, *factors, slope, sum_g, sum_g_xhat, need_residual)
        if need_residual:
            grad_residual = made
    return grad_x if need_x else None, grad_weight, grad_bias, grad_residual


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor,
        rstd: Tensor,
        norm: Norm,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.norm = run, slope, _ = norm
        # The residual is kept for the activation's mask alone.
        ctx.save_for_backward(x, mean, rstd, weight, bias, None if slope == 1 else residual)
        return run.apply(x, mean, rstd, weight, bias, residual, slope)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_create_graph("batch_norm_act", PLAIN)
        if grad is None:
            return (None,) * 7
        return *input_grads(grad, ctx.saved_tensors, ctx.norm, ctx.needs_input_grad[:4]), None, None, None

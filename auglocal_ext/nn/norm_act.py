"""Normalisation, residual and activation as one autograd node, and what the nodes of this folder share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import providers
from ..ops.batch_norm_passes import Passes, count_as_written
from ..ops.registry import refuse_create_graph
from .fusable import NormCall, counted

#: What has the second derivatives that the fused nodes have not.
PLAIN = "torch's own layers, which auglocal_ext.unfuse(module) puts back into a fused module"


def norm_act_call(run: Passes, x: Tensor, norm: NormCall, slope: float, residual: Tensor | None = None) -> Tensor:
    """:func:`auglocal_ext.ops.batch_norm_act` of an x with elements, as modules call it."""
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"expected residual {tuple(x.shape)} as x, got {tuple(residual.shape)}")
    if run.recorded is not None and norm_fits(norm, x, residual):
        return norm_act_in_training(run.recorded, x, norm, slope, residual)
    return _NormAct.apply(x, norm[0], norm[1], residual, (run, slope, norm))


def norm_act_in_training(
    recorded: Callable[..., Tensor], x: Tensor, norm: NormCall, slope: float, residual: Tensor | None
) -> Tensor:
    """:func:`norm_act_call` where :func:`norm_fits`, by ``Passes.recorded``."""
    weight, bias, mean, var, batches, _, momentum, eps, _ = norm
    return recorded(x, mean, var, batches, weight, bias, residual, float(momentum), float(eps), slope)


def norm_fits(norm: NormCall, x: Tensor, residual: Tensor | None) -> bool:
    """Whether ``norm``, in training, can go over x in one op, with nothing to refuse or explain."""
    weight, bias, *_, training, momentum, _, fit = norm
    if not training or momentum is None or fit is None:
        return False
    dtype, shape = x.dtype, x.shape
    if dtype not in providers.ALL or fit.dtype is not (torch.float64 if dtype is torch.float64 else torch.float32):
        return False
    for vector in (weight, bias):
        if vector is not None and not (vector.dtype is fit.dtype or vector.dtype is dtype):
            return False
    if shape[1] != fit.channels or x.device != fit.device or not x.numel() > fit.channels:
        return False
    return residual is None or residual.shape == shape and residual.dtype is dtype and residual.device == x.device


#: What the passes of ``batch_norm_act`` are told in backward besides tensors, after the passes: slope, and training.
Norm = tuple[Passes, float, bool]


def count_as_updated(norms: Iterable[NormCall]) -> None:
    """Tell autograd that the running statistics of ``norms`` will be updated, at once for all of them."""
    count_as_written(*[tensor for norm in norms if norm[5] for tensor in norm[2:5]])


def normalised(
    run: Passes, x: Tensor, norm: NormCall, slope: float, residual: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """act(bn(x) + residual), and the mean and rstd of x; no gradients, and otherwise as :func:`factors`."""
    weight, bias, *vectors, training, momentum, eps, fit = norm
    if fit is not None and training and x.size(1) == fit.channels and x.device == fit.device:
        if momentum is not None and fit.dtype is run.wide and x.numel() > fit.channels:
            return run.forward_(x, *vectors, weight, bias, residual, momentum, eps, slope)
    mean, rstd = factors(run, x, norm)
    return run.apply(x, mean, rstd, weight, bias, residual, slope), mean, rstd


def factors(run: Passes, x: Tensor, norm: NormCall) -> tuple[Tensor, Tensor]:
    """mean and rstd of x, and the running statistics updated; ValueError for vectors that do not fit x."""
    _check(x, norm[:4])
    return run.factors(x, *counted(norm)[2:8])


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
    needs = need_x, need_weight or need_bias, need_residual and slope != 1
    grad_x, grad_residual, sum_g, sum_g_xhat = run.backward(grad, *factors, slope, training, *needs)
    if need_weight and sum_g_xhat.dtype is not factors[3].dtype:
        sum_g_xhat = sum_g_xhat.to(factors[3].dtype)
    if need_bias and sum_g.dtype is not factors[4].dtype:
        sum_g = sum_g.to(factors[4].dtype)
    if slope == 1:
        grad_residual = grad
    return (
        grad_x if need_x else None,
        sum_g_xhat if need_weight else None,
        sum_g if need_bias else None,
        grad_residual if need_residual else None,
    )


class _NormAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        options: tuple[Passes, float, NormCall],
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        run, slope, norm = options
        ctx.norm = run, slope, norm[5]
        y, mean, rstd = normalised(run, x, norm, slope, residual)
        # The residual is kept for the activation's mask alone.
        ctx.save_for_backward(x, mean, rstd, weight, bias, None if slope == 1 else residual)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_create_graph("batch_norm_act", PLAIN)
        if grad is None:
            return (None,) * 5
        return *input_grads(grad, ctx.saved_tensors, ctx.norm, ctx.needs_input_grad[:4]), None

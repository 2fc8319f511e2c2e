"""layer_norm by torch's own kernels; see ``reference/layer_norm.py``.

Torch's LayerNorm kernels make the statistics and the gradients. What they return in the dtype of 16-bit rows, where the
op promises float32, is made from rows converted to float32. y is made by pointwise kernels, for torch has none that
takes statistics and would make the same bits again. On the CPU the last bits of grad_weight and grad_bias may depend on
the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import providers
from ..reference import layer_norm as reference

_backward_kernel = torch.ops.aten.native_layer_norm_backward


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, total, mean and rstd."""
    total = x.new_empty(0) if residual is None else x + residual
    rows = x if residual is None else total
    mean, rstd = _statistics(rows, eps, rms)
    return apply(rows, mean, rstd, weight, bias, rms), total, mean, rstd


def apply(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool) -> Tensor:
    """y = (x - mean) rstd weight + bias."""
    y = x * rstd[:, None] if rms else torch.sub(x, mean[:, None]).mul_(rstd[:, None])
    if bias is not None and weight is not None:
        torch.addcmul(bias.to(y.dtype), y, weight.to(y.dtype), out=y)
    elif weight is not None:
        y.mul_(weight)
    return y.to(x.dtype)


def backward(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    rms: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x, grad_weight and grad_bias, those that are needed."""
    if rms:
        return reference.backward(grad, grad_total, x, mean, rstd, weight, rms, need_x, need_weight, need_bias)
    low = x.dtype in providers.LOW
    rows = x
    if low and (x.is_cuda or grad_total is not None):  # to be rounded last
        rows, grad = x.to(rstd.dtype), grad.to(rstd.dtype)
    scale = weight
    if scale is None and low:  # statistics of another dtype than the rows' are allowed beside a weight of theirs
        scale = torch.ones(x.shape[1], dtype=rstd.dtype, device=x.device)
    scale = None if scale is None else scale.to(rstd.dtype)
    grad_x, grad_weight, grad_bias = _backward_kernel(
        *(grad, rows, x.shape[1:], mean[:, None], rstd[:, None], scale, scale), (need_x, need_weight, need_bias)
    )
    if need_x and grad_total is not None:
        grad_x = grad_x.add_(grad_total)
    return (
        grad_x.to(x.dtype) if need_x else x.new_empty(0),
        grad_weight if need_weight else rstd.new_empty(0),
        grad_bias if need_bias else rstd.new_empty(0),
    )


def _statistics(rows: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if rows.dtype == torch.float64 else torch.float32
    if rms:
        squares = torch.linalg.vector_norm(rows, dim=1, dtype=wide).square_().div_(rows.shape[1])
        return squares.new_empty(0), squares.add_(eps).rsqrt_()
    scale = None
    if rows.dtype in providers.LOW and not rows.is_cuda:  # without it the statistics have the dtype of the rows
        scale = torch.ones(rows.shape[1], dtype=wide, device=rows.device)
    _, mean, rstd = torch.native_layer_norm(rows, rows.shape[1:], scale, None, eps)
    return mean.view(-1), rstd.view(-1)

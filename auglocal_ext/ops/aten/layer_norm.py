"""layer_norm by torch's own kernels; see ``reference/layer_norm.py``.

Torch's LayerNorm kernels make the gradients, and on CUDA the statistics; on the CPU those lose digits where the mean is
large. They add 16-bit rows up in 16 bits here and there, so such rows are converted to float32 first. y is made by
pointwise kernels, for torch has none that takes statistics and would make the same bits again. On the CPU the last bits
of grad_weight and grad_bias may depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import providers
from ..layout import over_rows
from ..reference import layer_norm as reference

_backward_kernel = torch.ops.aten.native_layer_norm_backward


@over_rows(2)
def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, total, mean and rstd."""
    total = x.new_empty(0) if residual is None else x + residual
    rows = x if residual is None else total
    wide = _wide(rows)
    mean, rstd = _statistics(wide, eps, rms)
    return _apply(rows, wide, mean, rstd, weight, bias, rms), total, mean, rstd


@over_rows(1)
def apply(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool) -> Tensor:
    """y = (x - mean) rstd weight + bias."""
    return _apply(x, _wide(x), mean, rstd, weight, bias, rms)


@over_rows(3)
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
    if rms:  # torch's kernel of it is CUDA's alone
        return reference.backward(grad, grad_total, x, mean, rstd, weight, rms, need_x, need_weight, need_bias)
    scale = None if weight is None else weight.to(rstd.dtype)
    needs = need_x, need_weight, need_bias
    grad_x, grad_weight, grad_bias = _backward_kernel(
        _wide(grad), _wide(x), x.shape[1:], mean[:, None], rstd[:, None], scale, scale, needs
    )
    if need_x and grad_total is not None:
        grad_x.add_(grad_total)
    return (
        grad_x.to(x.dtype) if need_x else x.new_empty(0),
        grad_weight if need_weight else rstd.new_empty(0),
        grad_bias if need_bias else rstd.new_empty(0),
    )


def _wide(rows: Tensor) -> Tensor:
    """The rows in the dtype of the statistics; kernels of two dtypes are slower than a conversion."""
    return rows.float() if rows.dtype in providers.LOW else rows


def _statistics(wide: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    if wide.is_cuda and not rms:
        _, mean, rstd = torch.native_layer_norm(wide, wide.shape[1:], None, None, eps)
        return mean.view(-1), rstd.view(-1)
    mean = wide.new_empty(0)
    if not rms:
        mean = wide.mean(1)
        # Where the mean is huge it is a digit off, which its own differences make good.
        wide = wide - mean[:, None]
        correction = wide.mean(1)
        mean.add_(correction)
        wide.sub_(correction[:, None])
    var = torch.linalg.vector_norm(wide, dim=1).square_().div_(wide.shape[1])
    return mean, var.add_(eps).rsqrt_()


def _apply(
    x: Tensor, wide: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool
) -> Tensor:
    y = wide * rstd[:, None] if rms else torch.sub(wide, mean[:, None]).mul_(rstd[:, None])
    if bias is not None and weight is not None:
        torch.addcmul(bias.to(y.dtype), y, weight.to(y.dtype), out=y)
    elif weight is not None:
        y.mul_(weight.to(y.dtype))
    return y.to(x.dtype)

"""Layer normalisation of rows in plain PyTorch: statistics, forward, and backward from what they leave.

Every sum and statistic is float32 (float64 for a double x), and so are weight and bias where they are used.

What every provider does:

- **The passes are ops of their own**, without autograd, on maps (..., C) of any strides, of which the last dimension
  holds a row. Results are contiguous. ``layer_norm`` is one autograd node over them. Blocks that normalise before a
  linear layer call them between library products.
- **Only the rows that are normalised, mean and rstd are stored.** With a residual these rows are the sum, rounded to
  x's dtype, which the caller needs as well. ``layer_norm_apply`` makes y from them again, to the bit.
- **The variance is a mean of squared differences** from the mean, so that a row far from zero costs no digits.
- **Sums over rows have a fixed order.** Weight and bias get partial sums of groups of rows, whose number depends on the
  shape alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import over_rows


@over_rows(2)
def forward(
    x: Tensor,  # (R, C)
    residual: Tensor | None,  # (R, C), dtype of x
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,), beside a weight
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, total = x + residual (or no elements), mean_r (for rms no elements) and rstd_r = 1 / sqrt(var_r + eps).

    var_r = mean over c of (x - mean_r)^2, for rms mean over c of x^2; with a residual, of total in place of x.
    """
    total = x.new_empty(0) if residual is None else x + residual
    rows = x if residual is None else total
    wide = rows.to(_wide(x))
    mean = wide.new_empty(0)
    if not rms:
        mean = wide.mean(1)
        # Where the mean is huge it is a digit off, which its own differences make good.
        wide = wide - mean[:, None]
        correction = wide.mean(1)
        mean, wide = mean + correction, wide - correction[:, None]
    rstd = 1 / (wide.square().mean(1) + eps).sqrt()
    return apply(rows, mean, rstd, weight, bias, rms), total, mean, rstd


@over_rows(1)
def apply(
    x: Tensor,  # (R, C)
    mean: Tensor,  # (R,), unused for rms
    rstd: Tensor,  # (R,)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    rms: bool,
) -> Tensor:
    """y = (x - mean) rstd weight + bias, for rms x rstd weight."""
    y = _normalised(x, mean, rstd, rms)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)


@over_rows(3)
def backward(
    grad: Tensor,  # of y, (R, C)
    grad_total: Tensor | None,  # of total from its other uses, (R, C)
    x: Tensor,  # the rows that were normalised: x, or total
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    rms: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x = rstd (g - mean_c(g) - xhat mean_c(g xhat)) + grad_total, grad_weight = sum over r of grad xhat, and
    grad_bias = sum over r of grad.

    xhat = (x - mean) rstd and g = grad weight; for rms without mean_c(g). What is not needed has no elements.
    """
    wide = grad.to(_wide(x))
    xhat = _normalised(x, mean, rstd, rms)
    grad_weight = (wide * xhat).sum(0) if need_weight else wide.new_empty(0)
    grad_bias = wide.sum(0) if need_bias else wide.new_empty(0)
    if not need_x:
        return x.new_empty(0), grad_weight, grad_bias
    g = wide if weight is None else wide * weight.to(wide.dtype)
    grad_x = g - xhat * (g * xhat).mean(1, keepdim=True)
    if not rms:
        grad_x = grad_x - g.mean(1, keepdim=True)
    grad_x = grad_x * rstd[:, None]
    if grad_total is not None:
        grad_x = grad_x + grad_total
    return grad_x.to(x.dtype), grad_weight, grad_bias


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor, rms: bool) -> Tensor:
    """(x - mean) rstd in new memory and in the dtype of the statistics."""
    wide = x.to(rstd.dtype)
    return (wide if rms else wide - mean[:, None]) * rstd[:, None]

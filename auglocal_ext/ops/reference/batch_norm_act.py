"""Batch normalisation, residual and activation in plain PyTorch: statistics, forward, and backward in two steps.

Every sum and per-channel tensor is float32 (float64 for a double x). ``slope`` is that of the activation left of
zero: 1 no activation, 0 ReLU, anything else leaky ReLU.

What every provider does:

- **The passes are ops of their own**, without autograd. ``batch_norm_act`` is one autograd node over them; a
  convolution unit runs library convolutions between them. Each crossing into an op costs the host microseconds, so
  what a node calls together is also one op: ``batch_norm_act_forward_`` and ``batch_norm_act_backward``.
- **Only the raw input and per-channel vectors are stored**, and a reference to the residual where the activation's
  mask needs it. Backward makes the normalised value with the function that forward used, so both see the same mask.
  Without an activation the residual's gradient is the incoming one itself.
- **Statistics are sums of differences**: each thread's to a value it met, and all to one origin of the channel,
  merged as count, mean and squared deviations. A mean of 1e4 beside unit variance, or one value of 1e4 among small
  ones, costs no digits.
- **All passes walk a map in the same way.** A thread keeps its channels, so their factors stay in registers, and
  nothing is divided per element. The number of partial sums depends on the shape alone, never on the GPU, and so do
  the bits of a result. In CUDA, channels-last maps without gaps have kernels of their own
  (``csrc/cuda/batch_norm_act_rows.h``), compiled per activation and residual, with several vectors in flight.
- **In CUDA the last block of a tile of channels makes the result** (``csrc/cuda/channel_sums.h``), which saves a
  second launch. Blocks draw tickets from counters that end at zero again. The last block, whichever it is, merges all
  partial sums in the order of their place, in groups if they are many. Counters belong to a stream, and in a capture
  to one of its streams (``csrc/cuda/tickets.h``), so a graph can be replayed beside other work on that stream.
- **A gradient that is equal at all positions** (stride 0, as a pooled head's) is read without being expanded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import empty_like


def stats(
    x: Tensor,  # feature map, (N, C) or (N, C, *positions)
) -> tuple[Tensor, Tensor]:
    """mean_c = mean over n, p of x,  var_c = mean over n, p of (x - mean_c)^2."""
    dims = _all_but_channels(x)
    mean = x.mean(dims, dtype=_wide(x))
    # Where the mean is huge it is a digit off, which its own differences make good. (torch.var_mean is far slower.)
    difference = x - _over(mean, x)
    correction = difference.mean(dims)
    return mean + correction, difference.square_().mean(dims).sub_(correction.square()).clamp_(min=0)


def factors_(
    x: Tensor,
    running_mean: Tensor | None,  # (C,), updated, as the one below
    running_var: Tensor | None,  # (C,)
    num_batches_tracked: Tensor | None,  # (), int64, counted up
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """mean and rstd = 1 / sqrt(var + eps); r <- (1 - momentum) r + momentum s with s the mean and the unbiased var."""
    mean, var = stats(x)
    return updated_(x, mean, var, running_mean, running_var, num_batches_tracked, momentum, eps)


def updated_(
    x: Tensor,
    mean: Tensor,  # (C,) of x, as the one below
    var: Tensor,  # (C,)
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """What :func:`factors_` does with the statistics; ``var`` becomes rstd."""
    count = x.numel() // x.shape[1]
    if running_mean is not None:
        running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    if running_var is not None:
        running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return mean, var.add_(eps).rsqrt_()


def apply(
    x: Tensor,  # (N, C) or (N, C, *positions)
    mean: Tensor,  # (C,)
    rstd: Tensor,  # (C,) 1 / sqrt(var + eps)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    residual: Tensor | None,  # shape and dtype of x
    slope: float,
) -> Tensor:
    """y = act(z),  z = (x - mean) rstd weight + bias + residual."""
    z = _normalised(x, mean, rstd, weight, bias, residual)
    return _laid_out(_activate(z, z, slope), x)


def reduce(
    grad: Tensor,  # of y; any strides, 0 too
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,  # read where there is an activation
    slope: float,
) -> tuple[Tensor, Tensor]:
    """sum over n, p of g and of g xhat, with g = grad act'(z) and xhat = (x - mean) rstd; z and xhat are made again."""
    g = _masked(grad, x, mean, rstd, weight, bias, residual, slope)
    dims = _all_but_channels(x)
    return g.sum(dims), g.mul(x - _over(mean, x)).sum(dims) * rstd


def input_grad(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
    sum_g: Tensor | None,  # (C,) from reduce; None where the statistics were not made from x
    sum_g_xhat: Tensor | None,  # (C,)
    need_residual: bool,
) -> tuple[Tensor, Tensor]:
    """grad_x = weight rstd (g - (sum_g + xhat sum_g_xhat) / M) with M = N P, and grad_residual = g (or no elements).

    Without the sums grad_x = weight rstd g: the statistics are constants.
    """
    g = _masked(grad, x, mean, rstd, weight, bias, residual, slope)
    grad_residual = _laid_out(g, x) if need_residual else x.new_empty(0)
    if sum_g is not None and sum_g_xhat is not None:
        count = x.numel() // x.shape[1]
        g = (x - _over(mean, x)).mul_(_over(-rstd * sum_g_xhat / count, x)).add_(g).sub_(_over(sum_g / count, x))
    return _laid_out(g * _over(_scale(rstd, weight), x), x), grad_residual


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _all_but_channels(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def _over(channels: Tensor, x: Tensor) -> Tensor:
    """A per-channel tensor in the accumulation dtype, to be broadcast over the map."""
    return channels.to(_wide(x)).view(1, -1, *(1,) * (x.dim() - 2))


def _scale(rstd: Tensor, weight: Tensor | None) -> Tensor:
    return rstd if weight is None else rstd * weight


def _normalised(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    z = (x - _over(mean, x)).mul_(_over(_scale(rstd, weight), x))
    if bias is not None:
        z.add_(_over(bias, x))
    return z if residual is None else z.add_(residual)


def _activate(value: Tensor, z: Tensor, slope: float) -> Tensor:
    """value act'(z): as in torch a NaN passes ReLU, which multiplies nothing by zero, and falls left in leaky ReLU."""
    if slope == 1:
        return value
    if slope == 0:
        return torch.where(z <= 0, 0, value)
    return torch.where(z > 0, value, value * slope)


def _masked(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
) -> Tensor:
    if slope == 1:
        return grad.to(_wide(x))
    return _activate(grad.to(_wide(x)), _normalised(x, mean, rstd, weight, bias, residual), slope)


def _laid_out(value: Tensor, x: Tensor) -> Tensor:
    """``value`` in the dtype of x and where ``empty_like(x)`` puts it, never the same memory as another tensor's."""
    return empty_like(x).copy_(value)

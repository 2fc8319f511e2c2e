"""Batch normalisation, residual and activation by torch's own kernels; see ``reference/batch_norm_act.py``.

Torch's BatchNorm kernels run on CUDA, and on the CPU for 16-bit maps. For float32 and float64 on the CPU they are
slower than reductions and pointwise kernels, and lose digits where the mean is large. On the CPU the last bits may
depend on the number of threads, and a constant channel of a 16-bit map becomes its bias only up to rounding.

Torch's kernels round each result to the dtype of the map. Where that would be more than one rounding, as of a 16-bit
sum with a residual, the map is converted to float32 first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import providers
from ..layout import empty_like
from ..reference import batch_norm_act as reference

_backward_kernel = torch.ops.aten.native_batch_norm_backward


def stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (C,) over images and positions."""
    if not _by_batch_norm(x):
        return reference.stats(x)
    # Statistics have the dtype of the running ones, which are not updated here.
    unused = x.new_zeros(x.shape[1], dtype=_wide(x))
    mean, var = torch.batch_norm_update_stats(_plain(x), unused, unused, 0.0)
    return mean, var


def factors_(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """mean and rstd (C,); the running statistics are updated and the batch is counted."""
    mean, var = stats(x)
    return reference.updated_(x, mean, var, running_mean, running_var, num_batches_tracked, momentum, eps)


def apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
) -> Tensor:
    """y = act((x - mean) rstd weight + bias + residual)."""
    y = _normalised(x, mean, rstd, weight, bias, residual)
    if slope == 0:
        return y.relu_()
    return y if slope == 1 else torch.nn.functional.leaky_relu_(y, slope)


def reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """sum_g and sum_g_xhat (C,)."""
    return _sums(masked(grad, x, mean, rstd, weight, bias, residual, slope), x, mean, rstd)


def input_grad(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
    sum_g: Tensor | None,
    sum_g_xhat: Tensor | None,
    need_residual: bool,
) -> tuple[Tensor, Tensor]:
    """grad_x, and grad_residual or no elements."""
    g = masked(grad, x, mean, rstd, weight, bias, residual, slope)
    return _input_grad(g, x, mean, rstd, weight, sum_g, sum_g_xhat), _own(g, grad, x, need_residual)


def backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
    training: bool,
    need_x: bool,
    need_vectors: bool,
    need_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both gradients and both sums, those that are needed, with the masked gradient made once."""
    g = masked(grad, x, mean, rstd, weight, bias, residual, slope)
    grad_residual = _own(g, grad, x, need_residual)
    if training and need_x and _by_batch_norm(x) and g.dtype == x.dtype:
        scale = torch.ones_like(rstd) if weight is None else weight.to(rstd.dtype)
        made, sum_g_xhat, sum_g = _backward_kernel(
            _plain_as(g, x), _plain(x), scale, None, None, mean, rstd, True, 0.0, (True, True, True)
        )
        return _laid_out(made, x), grad_residual, sum_g, sum_g_xhat
    sums: tuple[Tensor | None, Tensor | None] = (None, None)
    if need_vectors or (training and need_x):
        sums = _sums(g, x, mean, rstd)
    kept = sums if training and need_x else (None, None)
    grad_x = _input_grad(g, x, mean, rstd, weight, *kept) if need_x or need_residual else x.new_empty(0)
    sum_g, sum_g_xhat = (x.new_empty(0, dtype=_wide(x)) if made is None else made for made in sums)
    return grad_x, grad_residual, sum_g, sum_g_xhat


def _by_batch_norm(x: Tensor) -> bool:
    return x.is_cuda or x.dtype in providers.LOW


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _over(channels: Tensor, x: Tensor) -> Tensor:
    """A per-channel tensor in the accumulation dtype, to be broadcast over the map."""
    return channels.to(_wide(x)).view(1, -1, *(1,) * (x.dim() - 2))


def _scale(rstd: Tensor, weight: Tensor | None) -> Tensor:
    return rstd if weight is None else rstd * weight


def _plain(x: Tensor) -> Tensor:
    """x as torch's BatchNorm kernels are fast on it: (N, C, positions, 1), contiguous or channels-last."""
    if not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
        x = empty_like(x).copy_(x)
    return x.view(*x.shape[:2], -1, 1)


def _plain_as(grad: Tensor, x: Tensor) -> Tensor:
    """A gradient with the strides of ``_plain(x)``."""
    return _plain(_laid_out(grad, x))


def _laid_out(made: Tensor, x: Tensor) -> Tensor:
    """A map of x's dtype in x's shape, where ``empty_like(x)`` puts it; itself if it lies there."""
    made = made.view(x.shape) if made.shape != x.shape else made
    wanted = empty_like(x)
    return made if made.stride() == wanted.stride() else wanted.copy_(made)


def _normalised(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None
) -> Tensor:
    """(x - mean) rstd weight + bias + residual in new memory."""
    scale = _scale(rstd, weight)
    if _by_batch_norm(x) and (residual is None or x.dtype not in providers.LOW):
        z = empty_like(x)
        # Divided by a variance of 1: scale and mean are the forward pass's to the bit.
        factors = scale, None if bias is None else bias.to(scale.dtype), mean, torch.ones_like(mean)
        unused = mean.new_empty(0), mean.new_empty(0)
        torch.native_batch_norm(_plain(x), *factors, False, 0.0, 0.0, out=(_plain(z), *unused))
        return z if residual is None else z.add_(residual)
    z = _difference(x, mean)
    if bias is None:
        z.mul_(_over(scale, x))
    else:
        torch.addcmul(_over(bias, x), z, _over(scale, x), out=z)
    if residual is not None:
        z.add_(residual)
    return z if z.dtype == x.dtype else empty_like(x).copy_(z)


def _difference(x: Tensor, mean: Tensor) -> Tensor:
    """x - mean in new memory, in the accumulation dtype."""
    made = empty_like(x, dtype=_wide(x))
    if made.dtype == x.dtype:
        return torch.sub(x, _over(mean, x), out=made)
    return made.copy_(x).sub_(_over(mean, x))  # kernels of two dtypes are slower than both


def masked(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
) -> Tensor:
    """g = grad act'(z): ``grad`` itself without an activation, in float32 where the slope's product is not 16 bits."""
    if slope == 1:
        return grad
    z = _normalised(x, mean, rstd, weight, bias, residual)
    if slope == 0:
        return torch.ops.aten.threshold_backward.grad_input(grad, z, 0, grad_input=z)
    z = z.to(_wide(x))
    return torch.ops.aten.leaky_relu_backward.grad_input(grad.to(z.dtype), z, slope, False, grad_input=z)


def _own(g: Tensor, grad: Tensor, x: Tensor, needed: bool) -> Tensor:
    """The residual's gradient, which is not the memory of another tensor."""
    if not needed:
        return x.new_empty(0)
    return empty_like(x).copy_(g) if g is grad or g.dtype != x.dtype else g


def _sums(g: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    if _by_batch_norm(x) and g.dtype == x.dtype:
        _, sum_g_xhat, sum_g = _backward_kernel(
            _plain_as(g, x), _plain(x), torch.ones_like(mean), None, None, mean, rstd, True, 0.0, (False, True, True)
        )
        return sum_g, sum_g_xhat
    dims = (0, *range(2, x.dim()))
    return g.sum(dims, dtype=_wide(x)), _difference(x, mean).mul_(g).sum(dims) * rstd


def _input_grad(
    g: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    sum_g: Tensor | None,
    sum_g_xhat: Tensor | None,
) -> Tensor:
    scale = _scale(rstd, weight)
    if sum_g is not None and sum_g_xhat is not None:
        factor = -scale / (x.numel() // x.shape[1])
        made = _difference(x, mean)
        torch.addcmul(_over(factor * sum_g, x), made, _over(factor * rstd * sum_g_xhat, x), out=made)
        made.add_(g.to(made.dtype).mul(_over(scale, x)))
        return made.to(x.dtype)
    if _by_batch_norm(x) and g.dtype == x.dtype:
        made, _, _ = _backward_kernel(
            *(_plain_as(g, x), _plain(x), scale, mean, torch.ones_like(mean), None, None, False, 0.0),
            (True, False, False),
        )
        return _laid_out(made, x)
    return torch.mul(g, _over(scale, x), out=empty_like(x))

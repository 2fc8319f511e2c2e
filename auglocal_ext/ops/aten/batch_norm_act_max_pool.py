"""Batch normalisation, activation and max pooling by torch's own kernels.

Torch's pooling returns int64 indices, which are made into bytes at once, and made again in backward. The channel sums
need only the elements that the bytes name, which are gathered. There is no CUDA implementation: torch's backward of
max pooling adds with atomics there, in no fixed order.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import empty_like
from ..reference.batch_norm_act_max_pool import Window, empty_pooled
from . import batch_norm_act


def apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: float,
    *window: int,
) -> tuple[Tensor, Tensor]:
    """y (N, C, H', W') and the place of each maximum in its window, uint8."""
    a = batch_norm_act.apply(x, mean, rstd, weight, bias, None, slope)
    found, places = F.max_pool2d(a, window[:2], window[2:4], window[4:], return_indices=True)
    y, indices = (empty_pooled(x, window, dtype) for dtype in (x.dtype, torch.uint8))
    rows = (places // x.shape[3]).mul_(window[1] - x.shape[3])
    return y.copy_(found), indices.copy_(places.add_(rows).sub_(_origins(indices, window, window[1])))


def reduce(
    grad: Tensor,
    indices: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: float,
    *window: int,
) -> tuple[Tensor, Tensor]:
    """sum_g and sum_g_xhat (C,), over the pooled map."""
    named = _named(x, _places(indices, x, window))
    return batch_norm_act.reduce(grad, named, mean, rstd, weight, bias, None, slope)


def input_grad(
    grad: Tensor,
    indices: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: float,
    sum_g: Tensor | None,
    sum_g_xhat: Tensor | None,
    *window: int,
) -> Tensor:
    """grad_x, laid out as x."""
    places = _places(indices, x, window)
    g = batch_norm_act.masked(grad, _named(x, places), mean, rstd, weight, bias, None, slope)
    # In the accumulation dtype, as an element may be the maximum of several windows.
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    unpooled = empty_like(x, dtype=wide)
    torch.ops.aten.max_pool2d_with_indices_backward.grad_input(
        g.to(wide), unpooled, window[:2], window[2:4], window[4:], (1, 1), False, places, grad_input=unpooled
    )
    made, _ = batch_norm_act.input_grad(
        unpooled, x, mean, rstd, weight, None, None, 1.0, sum_g, sum_g_xhat, need_residual=False
    )
    return made


def _origins(indices: Tensor, window: Window, width: int) -> Tensor:
    """First row times ``width`` plus first column of each window (H', W'), which may lie outside of the map."""
    _, _, stride_h, stride_w, padding_h, padding_w = window
    rows = torch.arange(indices.shape[2], device=indices.device).mul_(stride_h).sub_(padding_h).mul_(width)
    return rows.unsqueeze(1) + torch.arange(indices.shape[3], device=indices.device).mul_(stride_w).sub_(padding_w)


def _places(indices: Tensor, x: Tensor, window: Window) -> Tensor:
    """The flat index in its plane of each element that ``indices`` names, as torch has it."""
    places = indices.long()
    return (places // window[1]).mul_(x.shape[3] - window[1]).add_(places).add_(_origins(indices, window, x.shape[3]))


def _named(x: Tensor, places: Tensor) -> Tensor:
    """The elements of x at these places, a map (N, C, H', W')."""
    return x.flatten(2).gather(2, places.flatten(2)).view(places.shape)

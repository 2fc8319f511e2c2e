"""Batch normalisation, activation and max pooling in plain PyTorch; what stays of the maxima is a byte each.

Every sum and per-channel tensor is float32 (float64 for a double x). ``slope`` is that of the activation left of
zero: 1 no activation, 0 ReLU, anything else leaky ReLU. ``window`` is kernel, stride and padding, each height and
width.

What every provider does (statistics are those of ``batch_norm_act``; the Triton kernels of both share
``triton/channelwise.py``):

- **A byte per maximum** is stored beside the raw input: its place in the window, which has at most 16x16 elements. So
  neither the normalised map nor int64 indices exist.
- **Values are compared in the map's precision**, so ties fall as in ``F.max_pool2d`` of the activated map, and the
  result is equal to the bit.
- **Backward gathers.** Each element of x adds up the gradients of the few windows around it whose byte names it, in a
  fixed order and without atomics. The channel sums run over the pooled map and read only the named elements.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import empty_like
from . import batch_norm_act

Window = tuple[int, ...]  # six numbers, as the ops take them


def pooled_size(shape: Sequence[int], window: Window) -> tuple[int, int]:
    """Height and width after pooling: floor((size + 2 padding - kernel) / stride) + 1."""
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w = window
    return (
        (shape[2] + 2 * padding_h - kernel_h) // stride_h + 1,
        (shape[3] + 2 * padding_w - kernel_w) // stride_w + 1,
    )


def empty_pooled(x: Tensor, window: Window, dtype: torch.dtype) -> Tensor:
    """Memory for a pooled map: channels-last where the channels of x lie together, else contiguous."""
    height, width = pooled_size(x.shape, window)
    if x.is_contiguous() or x.stride(1) != 1:
        return x.new_empty((*x.shape[:2], height, width), dtype=dtype)
    return x.new_empty((x.shape[0], height, width, x.shape[1]), dtype=dtype).movedim(-1, 1)


def outside(indices: Tensor, x: Tensor, window: Window) -> Tensor:
    """Which ``indices`` name no element of x: none of the window, or one of it that lies beside the map."""
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w = window
    places = indices.int()
    row = places // kernel_w + _starts(indices.shape[2], stride_h, padding_h, x).unsqueeze(1)
    column = places % kernel_w + _starts(indices.shape[3], stride_w, padding_w, x)
    inside = (row >= 0) & (row < x.shape[2]) & (column >= 0) & (column < x.shape[3])
    return ~inside | (places >= kernel_h * kernel_w)


def first_inside(indices: Tensor, window: Window) -> Tensor:
    """For each window (H', W') the index of its first element that lies in the map, in the dtype of ``indices``."""
    _, kernel_w, stride_h, stride_w, padding_h, padding_w = window
    row = (-_starts(indices.shape[2], stride_h, padding_h, indices)).clamp(min=0).unsqueeze(1)
    column = (-_starts(indices.shape[3], stride_w, padding_w, indices)).clamp(min=0)
    return (row * kernel_w + column).to(indices.dtype)


def apply(
    x: Tensor,  # feature map, (N, C, H, W)
    mean: Tensor,  # (C,)
    rstd: Tensor,  # (C,) 1 / sqrt(var + eps)
    weight: Tensor | None,  # (C,)
    bias: Tensor | None,  # (C,)
    slope: float,
    *window: int,
) -> tuple[Tensor, Tensor]:
    """y = max over the window of a, and where it was found; a = act((x - mean) rstd weight + bias) in x's dtype.

    indices (N, C, H', W') uint8: row of the window times kernel width plus column, of the largest a that comes first,
    or of the last NaN. What a window has outside of the map does not count.
    """
    _, kernel_w, stride_h, stride_w, padding_h, padding_w = window
    a = batch_norm_act.apply(x, mean, rstd, weight, bias, None, slope)
    found, places = F.max_pool2d(a, window[:2], window[2:4], window[4:], return_indices=True)
    row = places // x.shape[3] - _starts(places.shape[2], stride_h, padding_h, x).unsqueeze(1)
    column = places % x.shape[3] - _starts(places.shape[3], stride_w, padding_w, x)
    y, indices = (empty_pooled(x, window, dtype) for dtype in (x.dtype, torch.uint8))
    return y.copy_(found), indices.copy_(row * kernel_w + column)


def reduce(
    grad: Tensor,  # of y, (N, C, H', W'); any strides, 0 too
    indices: Tensor,  # of apply
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,  # read where there is an activation
    slope: float,
    *window: int,
) -> tuple[Tensor, Tensor]:
    """sum over n, p of g and of g xhat, with g = unpooled grad times act'(z) and xhat = (x - mean) rstd."""
    unpooled = _unpooled(grad, indices, x, window)
    return batch_norm_act.reduce(unpooled, x, mean, rstd, weight, bias, None, slope)


def input_grad(
    grad: Tensor,
    indices: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: float,
    sum_g: Tensor | None,  # (C,) from reduce; None where the statistics were not made from x
    sum_g_xhat: Tensor | None,  # (C,)
    *window: int,
) -> Tensor:
    """grad_x = weight rstd (g - (sum_g + xhat sum_g_xhat) / M) with M = N H W; without the sums weight rstd g."""
    unpooled = _unpooled(grad, indices, x, window)
    made, _ = batch_norm_act.input_grad(unpooled, x, mean, rstd, weight, bias, None, slope, sum_g, sum_g_xhat, False)
    return empty_like(x).copy_(made)


def _starts(count: int, stride: int, padding: int, x: Tensor) -> Tensor:
    """First row (or column) of each window; negative where it begins outside of the map."""
    return torch.arange(count, device=x.device) * stride - padding


def _unpooled(grad: Tensor, indices: Tensor, x: Tensor, window: Window) -> Tensor:
    """The gradient of each element of the activated map: the sum of those of the windows whose maximum it was."""
    kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w = window
    wide = grad.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    images, channels, height, width = x.shape
    padded = wide.new_zeros(images, channels, height + 2 * padding_h, width + 2 * padding_w)
    # One place of all windows at a time: they do not overlap there, and the order of the additions is fixed.
    for index in range(kernel_h * kernel_w):
        row, column = divmod(index, kernel_w)
        rows = slice(row, row + stride_h * (grad.shape[2] - 1) + 1, stride_h)
        columns = slice(column, column + stride_w * (grad.shape[3] - 1) + 1, stride_w)
        padded[:, :, rows, columns] += torch.where(indices == index, wide, 0)
    return padded[:, :, padding_h : padding_h + height, padding_w : padding_w + width]

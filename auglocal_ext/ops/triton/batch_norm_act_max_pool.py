"""batch_norm_act_max_pool in Triton: one pass forward; backward partial sums, their merge, and one pass that gathers.

What a program works on, and what it is told of its channels: see ``channelwise``. The units are those of the pooled map
in the first two kernels, of x in the last. The window is a constant, and small ones are unrolled.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_like
from ..reference.batch_norm_act_max_pool import Window, empty_pooled, pooled_size
from .channelwise import (
    Plan,
    activated,
    factors,
    finish_sums,
    gradient_means,
    new,
    on_device,
    options,
    own_channels,
    own_units,
    vector,
)

MOST_UNROLLED = 16  # elements of a window, or windows around an element


@triton.jit
def _place(unit, positions, units_an_image, width, BLOCK_P: tl.constexpr):
    """Image of a unit, rows and columns of its positions, and which of them there are."""
    i_n = unit // units_an_image
    o_p = ((unit % units_an_image) * BLOCK_P).to(tl.int32) + tl.arange(0, BLOCK_P)
    o_h = o_p // width
    return i_n, o_h[None, :], (o_p - o_h * width)[None, :], (o_p < positions)[None, :]


@triton.jit
def _compared(
    index,
    largest,
    found,
    X_ptr,
    top,
    left,
    mask,
    mean,
    scale,
    bias,
    slope,
    height,
    width,
    stride_xh,
    stride_xw,
    KERNEL_W: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The largest so far and where it was, after the element `index` of the window: the first of equals, or a NaN."""
    o_h = top + index // KERNEL_W
    o_w = left + index % KERNEL_W
    mask = mask & (o_h >= 0) & (o_h < height) & (o_w >= 0) & (o_w < width)
    offsets = o_h.to(tl.int64) * stride_xh + o_w.to(tl.int64) * stride_xw
    x = tl.load(X_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    z = (x - mean) * scale + bias
    # What is compared has the precision of the map.
    value = activated(z, z, slope, ACTIVATION).to(X_ptr.dtype.element_ty).to(tl.float32)
    taken = mask & ((value > largest) | (value != value))
    return tl.where(taken, value, largest), tl.where(taken, index, found)


@triton.jit
def _apply_kernel(
    X_ptr,  # feature map, (N, C, H, W), any strides
    Y_ptr,  # (N, C, H', W'), any strides
    I_ptr,  # indices, (N, C, H', W') uint8, with the strides of Y
    mean_ptr,  # (C,) float32, as the three below
    rstd_ptr,
    W_ptr,  # weight, or anything
    B_ptr,  # bias, or anything
    slope,
    channels,
    positions,  # H' W'
    units_an_image,
    units,
    chunk,  # units of a program
    height,
    width,
    pooled_width,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_yn,
    stride_yc,
    stride_yh,
    stride_yw,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    o_c, m_c = own_channels(channels, BLOCK_C)
    mean, _, scale, bias = factors(mean_ptr, rstd_ptr, W_ptr, B_ptr, o_c, m_c, HAS_WEIGHT, HAS_BIAS)
    o_c = o_c[:, None]
    unit, end = own_units(units, chunk)
    # `while`: with numpy >= 2.5 the interpreter of Triton 3.6 cannot take the bound of a `range` from an argument.
    while unit < end:
        i_n, o_h, o_w, m_p = _place(unit, positions, units_an_image, pooled_width, BLOCK_P)
        mask = m_c[:, None] & m_p
        top = o_h * STRIDE_H - PADDING_H
        left = o_w * STRIDE_W - PADDING_W
        origin = X_ptr + i_n * stride_xn + o_c * stride_xc
        largest = tl.full((BLOCK_C, BLOCK_P), float("-inf"), dtype=tl.float32)
        found = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.int32)
        found += tl.maximum(-top, 0) * KERNEL_W + tl.maximum(-left, 0)
        if UNROLL:
            for step in tl.static_range(KERNEL_H * KERNEL_W):
                largest, found = _compared(
                    *(step, largest, found, origin, top, left, mask, mean, scale, bias, slope),
                    *(height, width, stride_xh, stride_xw, KERNEL_W, ACTIVATION),
                )
        else:
            index = 0
            while index < KERNEL_H * KERNEL_W:
                largest, found = _compared(
                    *(index, largest, found, origin, top, left, mask, mean, scale, bias, slope),
                    *(height, width, stride_xh, stride_xw, KERNEL_W, ACTIVATION),
                )
                index += 1
        offsets = i_n * stride_yn + o_c * stride_yc + o_h.to(tl.int64) * stride_yh + o_w.to(tl.int64) * stride_yw
        tl.store(Y_ptr + offsets, largest.to(Y_ptr.dtype.element_ty), mask=mask)
        tl.store(I_ptr + offsets, found.to(tl.uint8), mask=mask)
        unit += 1


@triton.jit
def _reduce_kernel(
    G_ptr,  # gradient of y, (N, C, H', W'), any strides
    I_ptr,  # indices, (N, C, H', W') uint8, any strides
    X_ptr,  # feature map, (N, C, H, W), any strides
    S_ptr,  # partial sums of g and of g (x - mean), (splits, 2, C) float32
    mean_ptr,  # (C,) float32, as the three below
    rstd_ptr,
    W_ptr,  # weight, or anything
    B_ptr,  # bias, or anything
    slope,
    channels,
    positions,  # H' W'
    units_an_image,
    units,
    chunk,  # units of a program
    pooled_width,
    stride_gn,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_in,
    stride_ic,
    stride_ih,
    stride_iw,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    o_c, m_c = own_channels(channels, BLOCK_C)
    mean, _, scale, bias = factors(mean_ptr, rstd_ptr, W_ptr, B_ptr, o_c, m_c, HAS_WEIGHT, HAS_BIAS)
    S_ptr += tl.program_id(1).to(tl.int64) * 2 * channels + o_c
    o_c = o_c[:, None]
    sum_g = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    sum_gx = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    unit, end = own_units(units, chunk)
    while unit < end:
        i_n, o_h, o_w, m_p = _place(unit, positions, units_an_image, pooled_width, BLOCK_P)
        mask = m_c[:, None] & m_p
        h, w = o_h.to(tl.int64), o_w.to(tl.int64)
        index = tl.load(I_ptr + i_n * stride_in + o_c * stride_ic + h * stride_ih + w * stride_iw, mask=mask, other=0)
        g = tl.load(G_ptr + i_n * stride_gn + o_c * stride_gc + h * stride_gh + w * stride_gw, mask=mask, other=0.0)
        index = index.to(tl.int32)
        x_h = h * STRIDE_H - PADDING_H + index // KERNEL_W
        x_w = w * STRIDE_W - PADDING_W + index % KERNEL_W
        x_offsets = i_n * stride_xn + o_c * stride_xc + x_h * stride_xh + x_w * stride_xw
        difference = tl.load(X_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32) - mean
        g = activated(g.to(tl.float32), difference * scale + bias, slope, ACTIVATION)
        g = tl.where(mask, g, 0.0)
        sum_g += g
        sum_gx += tl.where(mask, g * difference, 0.0)
        unit += 1
    tl.store(S_ptr, tl.sum(sum_g, axis=1), mask=m_c)
    tl.store(S_ptr + channels, tl.sum(sum_gx, axis=1), mask=m_c)


@triton.jit
def _gathered(
    step,  # which of the windows around each element
    G_ptr,
    I_ptr,
    o_h,
    o_w,
    mask,
    pooled_height,
    pooled_width,
    stride_gh,
    stride_gw,
    stride_ih,
    stride_iw,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    WINDOWS_H: tl.constexpr,
    WINDOWS_W: tl.constexpr,
):
    """The gradient of those windows that have their largest value here, 0 of the others."""
    i_h = (o_h + PADDING_H) // STRIDE_H - (WINDOWS_H - 1 - step // WINDOWS_W)
    i_w = (o_w + PADDING_W) // STRIDE_W - (WINDOWS_W - 1 - step % WINDOWS_W)
    row = o_h + PADDING_H - i_h * STRIDE_H
    column = o_w + PADDING_W - i_w * STRIDE_W
    mask = mask & (i_h >= 0) & (i_h < pooled_height) & (i_w >= 0) & (i_w < pooled_width)
    mask = mask & (row < KERNEL_H) & (column < KERNEL_W)
    i_h = i_h.to(tl.int64)
    i_w = i_w.to(tl.int64)
    index = tl.load(I_ptr + i_h * stride_ih + i_w * stride_iw, mask=mask, other=0).to(tl.int32)
    g = tl.load(G_ptr + i_h * stride_gh + i_w * stride_gw, mask=mask, other=0.0).to(tl.float32)
    return tl.where(mask & (index == row * KERNEL_W + column), g, 0.0)


@triton.jit
def _input_grad_kernel(
    G_ptr,  # gradient of y, (N, C, H', W'), any strides
    I_ptr,  # indices, (N, C, H', W') uint8, any strides
    X_ptr,  # feature map, (N, C, H, W), any strides
    mean_ptr,  # (C,) float32, as the three below
    rstd_ptr,
    W_ptr,  # weight, or anything
    B_ptr,  # bias, or anything
    sum_g_ptr,  # (C,) float32, or anything
    sum_gx_ptr,  # (C,) float32, or anything
    DX_ptr,  # gradient of x, (N, C, H, W), any strides
    slope,
    count,  # N H W
    channels,
    positions,  # H W
    units_an_image,
    units,
    chunk,  # units of a program
    width,
    pooled_height,
    pooled_width,
    stride_gn,
    stride_gc,
    stride_gh,
    stride_gw,
    stride_in,
    stride_ic,
    stride_ih,
    stride_iw,
    stride_xn,
    stride_xc,
    stride_xh,
    stride_xw,
    stride_dn,
    stride_dc,
    stride_dh,
    stride_dw,
    KERNEL_H: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PADDING_H: tl.constexpr,
    PADDING_W: tl.constexpr,
    WINDOWS_H: tl.constexpr,  # at most, around one element
    WINDOWS_W: tl.constexpr,
    UNROLL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    o_c, m_c = own_channels(channels, BLOCK_C)
    mean, rstd, scale, bias = factors(mean_ptr, rstd_ptr, W_ptr, B_ptr, o_c, m_c, HAS_WEIGHT, HAS_BIAS)
    mean_g, inner = gradient_means(sum_g_ptr, sum_gx_ptr, rstd, count, o_c, m_c, HAS_SUMS)
    o_c = o_c[:, None]
    unit, end = own_units(units, chunk)
    while unit < end:
        i_n, o_h, o_w, m_p = _place(unit, positions, units_an_image, width, BLOCK_P)
        mask = m_c[:, None] & m_p
        grads = G_ptr + i_n * stride_gn + o_c * stride_gc
        indices = I_ptr + i_n * stride_in + o_c * stride_ic
        g = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
        if UNROLL:
            for step in tl.static_range(WINDOWS_H * WINDOWS_W):
                g += _gathered(
                    *(step, grads, indices, o_h, o_w, mask, pooled_height, pooled_width),
                    *(stride_gh, stride_gw, stride_ih, stride_iw, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W),
                    *(PADDING_H, PADDING_W, WINDOWS_H, WINDOWS_W),
                )
        else:
            window = 0
            while window < WINDOWS_H * WINDOWS_W:
                g += _gathered(
                    *(window, grads, indices, o_h, o_w, mask, pooled_height, pooled_width),
                    *(stride_gh, stride_gw, stride_ih, stride_iw, KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W),
                    *(PADDING_H, PADDING_W, WINDOWS_H, WINDOWS_W),
                )
                window += 1
        h, w = o_h.to(tl.int64), o_w.to(tl.int64)
        x_offsets = i_n * stride_xn + o_c * stride_xc + h * stride_xh + w * stride_xw
        difference = tl.load(X_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32) - mean
        g = activated(g, difference * scale + bias, slope, ACTIVATION)
        if HAS_SUMS:
            g = g - mean_g - difference * inner
        d_offsets = i_n * stride_dn + o_c * stride_dc + h * stride_dh + w * stride_dw
        tl.store(DX_ptr + d_offsets, (g * scale).to(DX_ptr.dtype.element_ty), mask=mask)
        unit += 1


def _plan(like: Tensor, reduces: bool) -> Plan:
    """How programs share a map (N, C, H, W) of the shape and the layout of ``like``."""
    images, channels, height, width = like.shape
    if height * width >= 2**31:
        raise ValueError(f"expected a map of less than 2^31 positions, got {height}x{width}; use another provider")
    channels_last = like.stride(1) == 1 and like.stride(3) != 1
    return Plan(images, channels, height * width, channels_last=channels_last, elements=1024, reduces=reduces)


def _window(window: Window) -> dict[str, int]:
    names = ("KERNEL_H", "KERNEL_W", "STRIDE_H", "STRIDE_W", "PADDING_H", "PADDING_W")
    return dict(zip(names, window, strict=True))


def apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    slope: float,
    *window: int,
) -> tuple[Tensor, Tensor]:
    """The contract of the reference's ``apply``."""
    y, indices = empty_pooled(x, window, x.dtype), empty_pooled(x, window, torch.uint8)
    plan = _plan(y, reduces=False)
    mean = mean.contiguous()
    with on_device(x):
        _apply_kernel[plan.grid](
            *(x, y, indices, mean, rstd.contiguous(), vector(weight, mean), vector(bias, mean), slope),
            *(*plan.sizes, *x.shape[2:], y.shape[3], *x.stride(), *y.stride()),
            UNROLL=window[0] * window[1] <= MOST_UNROLLED,
            **_window(window),
            **options(weight, bias, slope),
            **plan.blocks,
        )
    return y, indices


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
    """The contract of the reference's ``reduce``."""
    plan = _plan(indices, reduces=True)
    partial = new(x, plan.splits, 2, plan.channels)
    mean, rstd, constants = mean.contiguous(), rstd.contiguous(), _window(window)
    del constants["KERNEL_H"]
    with on_device(x):
        _reduce_kernel[plan.grid](
            *(grad, indices, x, partial, mean, rstd, vector(weight, mean), vector(bias, mean), slope),
            *(*plan.sizes, grad.shape[3], *grad.stride(), *indices.stride(), *x.stride()),
            **constants,
            **options(weight, bias, slope),
            **plan.blocks,
        )
        return finish_sums(plan, partial, rstd)


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
    """The contract of the reference's ``input_grad``."""
    grad_x = empty_like(x)
    plan = _plan(grad_x, reduces=False)
    mean = mean.contiguous()
    pooled = pooled_size(x.shape, window)
    windows_h, windows_w = triton.cdiv(window[0], window[2]), triton.cdiv(window[1], window[3])
    with on_device(x):
        _input_grad_kernel[plan.grid](
            *(grad, indices, x, mean, rstd.contiguous(), vector(weight, mean), vector(bias, mean)),
            *(vector(sum_g, mean), vector(sum_g_xhat, mean), grad_x, slope, float(x.numel() // x.shape[1])),
            *(*plan.sizes, x.shape[3], *pooled, *grad.stride(), *indices.stride(), *x.stride(), *grad_x.stride()),
            WINDOWS_H=windows_h,
            WINDOWS_W=windows_w,
            UNROLL=windows_h * windows_w <= MOST_UNROLLED,
            HAS_SUMS=sum_g is not None and sum_g_xhat is not None,
            **_window(window),
            **options(weight, bias, slope),
            **plan.blocks,
        )
    return grad_x

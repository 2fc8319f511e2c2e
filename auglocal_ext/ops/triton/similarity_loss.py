"""similarity_loss in Triton: statistics, rows, then for blocks of rows a library product, pairs, a library product and
their gradients; backward is one pass over the map.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_like
from ..reference.similarity_loss import BLOCK, EPS, Outputs, wanted
from .channelwise import new, on_device


@triton.jit
def _statistics_kernel(
    Z_ptr,  # feature map, (N, C, P), any strides
    M_ptr,  # mean, (N, C) float32
    F_ptr,  # standard deviation, (N, C) float32
    channels,
    positions,
    stride_zn,
    stride_zc,
    stride_zp,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_p = tl.arange(0, BLOCK_P).to(tl.int64)
    m_c = o_c < channels
    Z_ptr += i_n * stride_zn
    c_offsets = o_c[:, None] * stride_zc
    origin = tl.load(Z_ptr + c_offsets, mask=m_c[:, None], other=0.0).to(tl.float32)
    # Every lane sums what differs from the first value it met, so that huge means cost no digits of the deviation.
    mask = m_c[:, None] & (o_p < positions)[None, :]
    shift = tl.load(Z_ptr + c_offsets + o_p[None, :] * stride_zp, mask=mask, other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    squares = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    counts = tl.zeros((1, BLOCK_P), dtype=tl.float32)
    # `while`: with numpy >= 2.5 the interpreter of Triton 3.6 cannot take the bound of a `range` from an argument.
    first = 0
    while first < positions:
        m_p = (first + o_p < positions)[None, :]
        mask = m_c[:, None] & m_p
        z = tl.load(Z_ptr + c_offsets + (first + o_p)[None, :] * stride_zp, mask=mask, other=0.0).to(tl.float32)
        difference = tl.where(mask, z - shift, 0.0)
        sums += difference
        squares += difference * difference
        counts += m_p.to(tl.float32)
        first += BLOCK_P
    several = tl.maximum(counts, 1.0)
    means = tl.where(counts > 0, (shift - origin) + sums / several, 0.0)
    squares = squares - sums * (sums / several)
    squares = tl.where(squares < 0, 0.0, squares)  # by rounding; a NaN stays one
    mean = tl.sum(means * counts, axis=1) / positions
    apart = tl.where(counts > 0, means - mean[:, None], 0.0)
    total = tl.sum(squares, axis=1) + tl.sum(apart * apart * counts, axis=1)
    tl.store(M_ptr + i_n * channels + o_c, tl.sum(origin, axis=1) + mean, mask=m_c)
    tl.store(F_ptr + i_n * channels + o_c, tl.sqrt(total / (positions - 1)), mask=m_c)


@triton.jit
def _input_grad_kernel(
    Z_ptr,  # feature map, (N, C, P), any strides
    DZ_ptr,  # (N, C, P), any strides
    M_ptr,  # mean, (N, C) float32
    D_ptr,  # factor, (N, C) float32
    G_ptr,  # gradient of the loss, () float32
    channels,
    positions,
    stride_zn,
    stride_zc,
    stride_zp,
    stride_dn,
    stride_dc,
    stride_dp,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_p = tl.arange(0, BLOCK_P).to(tl.int64)
    m_c = o_c < channels
    mean = tl.load(M_ptr + i_n * channels + o_c, mask=m_c, other=0.0)[:, None]
    scale = (tl.load(G_ptr) * tl.load(D_ptr + i_n * channels + o_c, mask=m_c, other=0.0))[:, None]
    Z_ptr += i_n * stride_zn
    DZ_ptr += i_n * stride_dn
    o_c = o_c[:, None]
    first = 0
    while first < positions:
        p = (first + o_p)[None, :]
        mask = m_c[:, None] & (p < positions)
        z = tl.load(Z_ptr + o_c * stride_zc + p * stride_zp, mask=mask, other=0.0).to(tl.float32)
        dz = ((z - mean) * scale).to(DZ_ptr.dtype.element_ty)
        tl.store(DZ_ptr + o_c * stride_dc + p * stride_dp, dz, mask=mask)
        first += BLOCK_P


@triton.jit
def _counted(label, classes, ignore_index):
    return (label >= 0) & (label < classes) & (label != ignore_index)


@triton.jit
def _normalise_kernel(
    F_ptr,  # features, (N, C) float32
    T_ptr,  # labels, (N,) int64
    U_ptr,  # rows of unit length, (N, C) float32
    L_ptr,  # lengths, (N,) float32
    V_ptr,  # number of labels that count, () float32
    images,
    channels,
    classes,
    ignore_index,
    eps,
    BLOCK_C: tl.constexpr,  # at least C
    BLOCK_N: tl.constexpr,  # labels at a time
):
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    features = tl.load(F_ptr + i_n * channels + o_c, mask=m_c, other=0.0)
    centred = tl.where(m_c, features - tl.sum(features, axis=0) / channels, 0.0)
    length = tl.sqrt(tl.sum(centred * centred, axis=0))
    counted = _counted(tl.load(T_ptr + i_n), classes, ignore_index)
    tl.store(U_ptr + i_n * channels + o_c, tl.where(counted, centred / (length + eps), 0.0), mask=m_c)
    tl.store(L_ptr + i_n, length)

    # One program counts the labels as well: nobody needs the count before a later launch.
    if i_n == 0:
        count = tl.zeros((BLOCK_N,), dtype=tl.int32)
        first = 0
        while first < images:
            o_n = first + tl.arange(0, BLOCK_N).to(tl.int64)
            label = tl.load(T_ptr + o_n, mask=o_n < images, other=-1)
            count += _counted(label, classes, ignore_index).to(tl.int32)
            first += BLOCK_N
        tl.store(V_ptr, tl.sum(count, axis=0).to(tl.float32))


@triton.jit
def _pairs_kernel(
    S_ptr,  # similarities, (rows, N) float32; the differences take their place
    T_ptr,  # labels, (N,) int64
    Q_ptr,  # sums of squared differences, (N,) float32
    row,  # first of the block
    images,
    classes,
    ignore_index,
    same,  # similarity that is wanted within a class
    different,  # and between two
    BLOCK_N: tl.constexpr,
):
    i_n = row + tl.program_id(0).to(tl.int64)
    label = tl.load(T_ptr + i_n)
    counted = _counted(label, classes, ignore_index)
    S_ptr += tl.program_id(0).to(tl.int64) * images
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first = 0
    while first < images:
        o_n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = o_n < images
        other = tl.load(T_ptr + o_n, mask=mask, other=-1)
        similar = tl.load(S_ptr + o_n, mask=mask, other=0.0)
        clamped = tl.where(similar < -1, -1.0, tl.where(similar > 1, 1.0, similar))  # a NaN stays one
        difference = clamped - tl.where(other == label, same, different)
        difference = tl.where(counted & _counted(other, classes, ignore_index), difference, 0.0)
        total += difference * difference
        tl.store(S_ptr + o_n, tl.where(clamped == similar, difference, 0.0), mask=mask)
        first += BLOCK_N
    tl.store(Q_ptr + i_n, tl.sum(total, axis=0))


@triton.jit
def _gradient_kernel(
    G_ptr,  # gradients of the block's rows of unit length but for 4 / V^2, (rows, C) float32
    U_ptr,  # rows of unit length, (N, C) float32
    L_ptr,  # lengths, (N,) float32
    F_ptr,  # features, (N, C) float32
    T_ptr,  # labels, (N,) int64
    V_ptr,  # number of labels that count, () float32
    D_ptr,  # factor, (N, C) float32
    row,  # first of the block
    channels,
    positions,
    classes,
    ignore_index,
    eps,
    IS_MAP: tl.constexpr,  # the features are standard deviations
    BLOCK_C: tl.constexpr,  # at least C
):
    i_n = row + tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    g = tl.load(G_ptr + tl.program_id(0).to(tl.int64) * channels + o_c, mask=m_c, other=0.0)
    unit = tl.load(U_ptr + i_n * channels + o_c, mask=m_c, other=0.0)
    length = tl.load(L_ptr + i_n)
    count = tl.load(V_ptr)
    scale = 4.0 / (count * count)
    across = tl.where(length > 0, scale * tl.sum(unit * g, axis=0) / length, 0.0)
    gradient = scale / (length + eps) * g - across * unit
    gradient = gradient - tl.sum(gradient, axis=0) / channels
    if IS_MAP:
        deviation = tl.load(F_ptr + i_n * channels + o_c, mask=m_c, other=0.0)
        gradient = tl.where(deviation > 0, gradient / (deviation * (positions - 1)), 0.0)
    counted = _counted(tl.load(T_ptr + i_n), classes, ignore_index)
    tl.store(D_ptr + i_n * channels + o_c, tl.where(counted, gradient, 0.0), mask=m_c)


@triton.jit
def _total_kernel(
    Q_ptr,  # sums of squared differences, (N,) float32
    V_ptr,  # number of labels that count, () float32
    loss_ptr,  # () float32
    images,
    BLOCK_N: tl.constexpr,
):
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first = 0
    while first < images:
        o_n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        total += tl.load(Q_ptr + o_n, mask=o_n < images, other=0.0)
        first += BLOCK_N
    count = tl.load(V_ptr)
    tl.store(loss_ptr, tl.sum(total, axis=0) / count / count)


def _tile(flat: Tensor) -> dict[str, int]:
    """Channels and positions a program takes at a time: long along the dimension that lies together in memory."""
    channels, positions = (triton.next_power_of_2(size) for size in flat.shape[1:])
    if flat.stride(1) == 1 and flat.stride(2) != 1:  # channels-last
        block_c = min(64, channels)
        return {"BLOCK_C": block_c, "BLOCK_P": min(2048 // block_c, positions)}
    block_p = min(512, positions)
    return {"BLOCK_C": min(2048 // block_p, channels), "BLOCK_P": block_p}


def _statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    flat = z.flatten(2)  # a view where the positions have one common stride, a contiguous copy otherwise
    images, channels, positions = flat.shape
    mean, deviation = new(z, images, channels), new(z, images, channels)
    tile = _tile(flat)
    grid = (images, triton.cdiv(channels, tile["BLOCK_C"]))
    _statistics_kernel[grid](flat, mean, deviation, channels, positions, *flat.stride(), **tile)
    return mean, deviation


def forward(z: Tensor, target: Tensor, classes: int, ignore_index: int, need_grad: bool) -> Outputs:
    """The contract of the reference's ``forward``, for float16, bfloat16 and float32."""
    images, channels = z.shape[:2]
    is_map = z.dim() > 2
    target = target.contiguous()
    block_c = triton.next_power_of_2(channels)
    with on_device(z):
        mean, features = _statistics(z) if is_map else (new(z, 0), z.to(torch.float32).contiguous())
        unit, length, count = new(z, images, channels), new(z, images), new(z)
        _normalise_kernel[(images,)](
            *(features, target, unit, length, count, images, channels, classes, ignore_index, EPS),
            BLOCK_C=block_c,
            BLOCK_N=256,
        )
        factor, losses, loss = new(z, *((images, channels) if need_grad else (0,))), new(z, images), new(z)
        rows = max(1, BLOCK // images)
        for first in range(0, images, rows):
            similar = unit[first : first + rows] @ unit.t()
            _pairs_kernel[(len(similar),)](
                *(similar, target, losses, first, images, classes, ignore_index, *wanted(classes)),
                BLOCK_N=min(1024, triton.next_power_of_2(images)),
            )
            if need_grad:
                _gradient_kernel[(len(similar),)](
                    *(similar @ unit, unit, length, features, target, count, factor),
                    *(first, channels, z.shape[2:].numel(), classes, ignore_index, EPS),
                    IS_MAP=is_map,
                    BLOCK_C=block_c,
                )
        _total_kernel[(1,)](losses, count, loss, images, BLOCK_N=1024)
    return loss, mean if need_grad else new(z, 0), factor


def input_grad(z: Tensor, mean: Tensor, factor: Tensor, grad_loss: Tensor) -> Tensor:
    """The contract of the reference's ``input_grad``."""
    grad_z = empty_like(z)
    flat, out = z.flatten(2), grad_z.flatten(2)
    tile = _tile(flat)
    grid = (len(flat), triton.cdiv(flat.shape[1], tile["BLOCK_C"]))
    with on_device(z):
        _input_grad_kernel[grid](
            *(flat, out, mean.contiguous(), factor.contiguous(), grad_loss, *flat.shape[1:]),
            *(*flat.stride(), *out.stride()),
            **tile,
        )
    return grad_z

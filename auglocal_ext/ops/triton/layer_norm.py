"""layer_norm in Triton: a program has whole rows in registers; in backward it sums over its rows on the way.

Of rows that are too long for registers the statistics, and the gradients of the vectors, are passes of their own.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..layout import over_rows
from .channelwise import new, on_device

# Sizes are the same on all GPUs, and so are the bits of a sum.
ELEMENTS = 2048  # of a program at a time
LONGEST = 8192  # row that is held in registers
TILE = 4096  # elements of a longer one at a time
# Programs of a pass that sums over rows, and rows and blocks of rows of one before a second shares its work.
PROGRAMS, LEAST_ROWS, LEAST_BLOCKS = 512, 16, 4


@triton.jit
def _place(block, rows, channels, tile, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows and channels of a tile, which of them there are, and where its elements lie."""
    o_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    m_r, m_c = o_r < rows, o_c < channels
    return o_r, m_r, o_c, m_c, (o_r * channels)[:, None] + o_c[None, :], m_r[:, None] & m_c[None, :]


@triton.jit
def _total(X_ptr, R_ptr, offsets, mask, HAS_RESIDUAL: tl.constexpr):
    """What is normalised, as it is stored and in float32."""
    x = tl.load(X_ptr + offsets, mask=mask, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(R_ptr + offsets, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(X_ptr.dtype.element_ty)
    return x.to(tl.float32)


@triton.jit
def _vector(V_ptr, o_c, m_c):
    return tl.load(V_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _of_rows(S_ptr, o_r, m_r):
    return tl.load(S_ptr + o_r, mask=m_r, other=0.0)[:, None]


@triton.jit
def _y(x, mean, rstd, W_ptr, B_ptr, o_c, m_c, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """One place for all passes, which have to make the same bits."""
    y = (x - mean) * rstd
    if HAS_BIAS:
        y = tl.fma(y, _vector(W_ptr, o_c, m_c), _vector(B_ptr, o_c, m_c))
    elif HAS_WEIGHT:
        y = y * _vector(W_ptr, o_c, m_c)
    return y


@triton.jit
def _forward_kernel(
    X_ptr,  # (R, C), as the three below
    R_ptr,  # residual, or anything
    Y_ptr,
    T_ptr,  # x + residual, or anything
    W_ptr,  # weight, (C,), or anything
    B_ptr,  # bias, (C,), or anything
    mean_ptr,  # (R,) float32, or for rms anything
    rstd_ptr,  # (R,) float32
    rows,
    channels,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,  # at least C
):
    o_r, m_r, o_c, m_c, offsets, mask = _place(tl.program_id(0).to(tl.int64), rows, channels, 0, BLOCK_R, BLOCK_C)
    x = _total(X_ptr, R_ptr, offsets, mask, HAS_RESIDUAL)
    if HAS_RESIDUAL:
        tl.store(T_ptr + offsets, x.to(T_ptr.dtype.element_ty), mask=mask)
    mean = tl.zeros((BLOCK_R, 1), dtype=tl.float32)
    difference = x
    if not RMS:
        mean = tl.sum(x, axis=1)[:, None] / channels
        difference = tl.where(mask, x - mean, 0.0)
        # Where the mean is huge it is a digit off, which its own differences make good.
        correction = tl.sum(difference, axis=1)[:, None] / channels
        mean += correction
        difference = tl.where(mask, difference - correction, 0.0)
    rstd = 1 / tl.sqrt_rn(tl.sum(difference * difference, axis=1)[:, None] / channels + eps)
    y = _y(x, mean, rstd, W_ptr, B_ptr, o_c, m_c, HAS_WEIGHT, HAS_BIAS)
    tl.store(Y_ptr + offsets, y.to(Y_ptr.dtype.element_ty), mask=mask)
    if not RMS:
        tl.store(mean_ptr + o_r[:, None], mean, mask=m_r[:, None])
    tl.store(rstd_ptr + o_r[:, None], rstd, mask=m_r[:, None])


@triton.jit
def _statistics_kernel(
    X_ptr,  # (R, C)
    R_ptr,  # residual, (R, C), or anything
    mean_ptr,  # (R,) float32, or for rms anything
    rstd_ptr,  # (R,) float32
    channels,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    start = i_r * channels
    mean = 0.0
    # `while`: with numpy >= 2.5 the interpreter of Triton 3.6 cannot take the bound of a `range` from an argument.
    if not RMS:
        origin = _total(X_ptr, R_ptr, start + tl.arange(0, 1), tl.full((1,), True, tl.int1), HAS_RESIDUAL)
        sums = tl.zeros((BLOCK_C,), dtype=tl.float32)
        first = 0
        while first < channels:
            o_c = first + tl.arange(0, BLOCK_C)
            x = _total(X_ptr, R_ptr, start + o_c, o_c < channels, HAS_RESIDUAL)
            sums += tl.where(o_c < channels, x - origin, 0.0)
            first += BLOCK_C
        mean = tl.sum(origin, axis=0) + tl.sum(sums, axis=0) / channels
    sums = tl.zeros((BLOCK_C,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_C,), dtype=tl.float32)
    first = 0
    while first < channels:
        o_c = first + tl.arange(0, BLOCK_C)
        x = _total(X_ptr, R_ptr, start + o_c, o_c < channels, HAS_RESIDUAL)
        difference = tl.where(o_c < channels, x - mean, 0.0)
        sums += difference
        squares += difference * difference
        first += BLOCK_C
    var = tl.sum(squares, axis=0) / channels
    if not RMS:
        correction = tl.sum(sums, axis=0) / channels  # of a mean that has been rounded
        var = tl.maximum(var - correction * correction, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(mean_ptr + i_r, mean)
    tl.store(rstd_ptr + i_r, 1 / tl.sqrt_rn(var + eps))


@triton.jit
def _apply_kernel(
    X_ptr,  # (R, C), as the three below
    R_ptr,  # residual, or anything
    Y_ptr,
    T_ptr,  # x + residual, or anything
    W_ptr,  # weight, (C,), or anything
    B_ptr,  # bias, (C,), or anything
    mean_ptr,  # (R,) float32, or for rms anything
    rstd_ptr,  # (R,) float32
    rows,
    channels,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    o_r, m_r, o_c, m_c, offsets, mask = _place(block, rows, channels, tl.program_id(1), BLOCK_R, BLOCK_C)
    x = _total(X_ptr, R_ptr, offsets, mask, HAS_RESIDUAL)
    if HAS_RESIDUAL:
        tl.store(T_ptr + offsets, x.to(T_ptr.dtype.element_ty), mask=mask)
    mean = tl.zeros((BLOCK_R, 1), dtype=tl.float32)
    if not RMS:
        mean = _of_rows(mean_ptr, o_r, m_r)
    y = _y(x, mean, _of_rows(rstd_ptr, o_r, m_r), W_ptr, B_ptr, o_c, m_c, HAS_WEIGHT, HAS_BIAS)
    tl.store(Y_ptr + offsets, y.to(Y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    G_ptr,  # gradient of y, (R, C), as the three below
    GT_ptr,  # gradient of total, or anything
    X_ptr,
    DX_ptr,  # gradient of x, or anything
    W_ptr,  # weight, (C,), or anything
    mean_ptr,  # (R,) float32, or for rms anything
    rstd_ptr,  # (R,) float32
    S_ptr,  # sums over a program's rows for weight and bias, (programs, 2, C) float32, or anything
    rows,
    channels,
    chunk,  # blocks of rows of a program
    HAS_TOTAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    RMS: tl.constexpr,
    NEED_X: tl.constexpr,  # of whole rows
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * chunk
    end = tl.minimum(block + chunk, tl.cdiv(rows, BLOCK_R))
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    if HAS_WEIGHT:
        weight = _vector(W_ptr, o_c, m_c)
    sum_gx = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    sum_g = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    while block < end:
        o_r = block * BLOCK_R + tl.arange(0, BLOCK_R)
        m_r = o_r < rows
        offsets, mask = (o_r * channels)[:, None] + o_c[None, :], m_r[:, None] & m_c[None, :]
        g = tl.load(G_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if NEED_BIAS:
            sum_g += g
        if NEED_X or NEED_WEIGHT:
            rstd = _of_rows(rstd_ptr, o_r, m_r)
            xhat = tl.load(X_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            if not RMS:
                xhat = tl.where(mask, xhat - _of_rows(mean_ptr, o_r, m_r), 0.0)
            xhat = xhat * rstd
            if NEED_WEIGHT:
                sum_gx += g * xhat
            if NEED_X:
                if HAS_WEIGHT:
                    g = g * weight
                grad_x = g - xhat * (tl.sum(g * xhat, axis=1)[:, None] / channels)
                if not RMS:
                    grad_x -= tl.sum(g, axis=1)[:, None] / channels
                grad_x = grad_x * rstd
                if HAS_TOTAL:
                    grad_x += tl.load(GT_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
                tl.store(DX_ptr + offsets, grad_x.to(DX_ptr.dtype.element_ty), mask=mask)
        block += 1
    S_ptr += tl.program_id(0).to(tl.int64) * 2 * channels + o_c
    if NEED_WEIGHT:
        tl.store(S_ptr, tl.sum(sum_gx, axis=0), mask=m_c)
    if NEED_BIAS:
        tl.store(S_ptr + channels, tl.sum(sum_g, axis=0), mask=m_c)


@triton.jit
def _input_grad_kernel(
    G_ptr,  # gradient of y, (R, C), as the three below
    GT_ptr,  # gradient of total, or anything
    X_ptr,
    DX_ptr,  # gradient of x
    W_ptr,  # weight, (C,), or anything
    mean_ptr,  # (R,) float32, or for rms anything
    rstd_ptr,  # (R,) float32
    channels,
    HAS_TOTAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    RMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    i_r = tl.program_id(0).to(tl.int64)
    start = i_r * channels
    rstd = tl.load(rstd_ptr + i_r)
    mean = 0.0
    if not RMS:
        mean = tl.load(mean_ptr + i_r)
    sum_gx = tl.zeros((BLOCK_C,), dtype=tl.float32)
    sum_g = tl.zeros((BLOCK_C,), dtype=tl.float32)
    first = 0
    while first < channels:
        o_c = first + tl.arange(0, BLOCK_C)
        m_c = o_c < channels
        g = tl.load(G_ptr + start + o_c, mask=m_c, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g = g * tl.load(W_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        x = tl.load(X_ptr + start + o_c, mask=m_c, other=0.0).to(tl.float32)
        sum_gx += g * ((x - mean) * rstd)
        sum_g += g
        first += BLOCK_C
    mean_gx = tl.sum(sum_gx, axis=0) / channels
    mean_g = tl.sum(sum_g, axis=0) / channels
    first = 0
    while first < channels:
        o_c = first + tl.arange(0, BLOCK_C)
        m_c = o_c < channels
        g = tl.load(G_ptr + start + o_c, mask=m_c, other=0.0).to(tl.float32)
        if HAS_WEIGHT:
            g = g * tl.load(W_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
        x = tl.load(X_ptr + start + o_c, mask=m_c, other=0.0).to(tl.float32)
        grad_x = g - ((x - mean) * rstd) * mean_gx
        if not RMS:
            grad_x -= mean_g
        grad_x = grad_x * rstd
        if HAS_TOTAL:
            grad_x += tl.load(GT_ptr + start + o_c, mask=m_c, other=0.0).to(tl.float32)
        tl.store(DX_ptr + start + o_c, grad_x.to(DX_ptr.dtype.element_ty), mask=m_c)
        first += BLOCK_C


@triton.jit
def _finish_kernel(
    S_ptr,  # (programs, 2, C) float32
    DW_ptr,  # gradient of weight, (C,) float32, or anything
    DB_ptr,  # gradient of bias, (C,) float32, or anything
    channels,
    programs,
    NEED_WEIGHT: tl.constexpr,
    NEED_BIAS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,  # programs at a time
):
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_s = tl.arange(0, BLOCK_S).to(tl.int64)[:, None]
    m_c = o_c < channels
    sum_gx = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    sum_g = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    first = 0
    while first < programs:
        mask = (first + o_s < programs) & m_c[None, :]
        offsets = (first + o_s) * 2 * channels + o_c[None, :]
        if NEED_WEIGHT:
            sum_gx += tl.load(S_ptr + offsets, mask=mask, other=0.0)
        if NEED_BIAS:
            sum_g += tl.load(S_ptr + offsets + channels, mask=mask, other=0.0)
        first += BLOCK_S
    if NEED_WEIGHT:
        tl.store(DW_ptr + o_c, tl.sum(sum_gx, axis=0), mask=m_c)
    if NEED_BIAS:
        tl.store(DB_ptr + o_c, tl.sum(sum_g, axis=0), mask=m_c)


def _tile(channels: int) -> dict[str, int]:
    """Rows and channels that a program has at a time, and its warps: 16 elements a thread."""
    block_c = min(triton.next_power_of_2(channels), LONGEST if channels <= LONGEST else TILE)
    block_r = max(ELEMENTS // block_c, 1)
    return {"BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": max(block_r * block_c // 512, 4)}


def _long(channels: int) -> dict[str, int]:
    """The same of one row that is too long for registers."""
    return {"BLOCK_C": TILE, "num_warps": TILE // 512}


def _shared(blocks: int, block_r: int, sums_rows: bool) -> tuple[int, int]:
    """Blocks of rows of a program, and programs: one for each block where nothing is summed over rows."""
    if not sums_rows:
        return 1, blocks
    least = max(LEAST_ROWS // block_r, LEAST_BLOCKS)
    chunk = triton.cdiv(blocks, min(PROGRAMS, triton.cdiv(blocks, least)))
    return chunk, triton.cdiv(blocks, chunk)


def _given(**tensors: Tensor | None) -> dict[str, bool]:
    return {f"HAS_{name.upper()}": tensor is not None for name, tensor in tensors.items()}


@over_rows(2)
def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The contract of the reference's ``forward``, for x in float16, bfloat16 and float32."""
    rows, channels = x.shape
    y, total = x.new_empty(x.shape), x.new_empty(0 if residual is None else x.shape)
    mean, rstd = new(x, 0 if rms else rows), new(x, rows)
    with on_device(x):
        if channels > LONGEST:
            _statistics_kernel[(rows,)](
                *(x, x if residual is None else residual, mean, rstd, channels, eps),
                **_given(residual=residual),
                RMS=rms,
                **_long(channels),
            )
            _apply(x, residual, y, total, weight, bias, mean, rstd, rms)
            return y, total, mean, rstd
        tile = _tile(channels)
        _forward_kernel[(triton.cdiv(rows, tile["BLOCK_R"]),)](
            *_maps(x, residual, y, total, weight, bias),
            *(mean, rstd, rows, channels, eps),
            **_given(residual=residual, weight=weight, bias=bias),
            RMS=rms,
            **tile,
        )
    return y, total, mean, rstd


@over_rows(1)
def apply(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool) -> Tensor:
    """The contract of the reference's ``apply``."""
    y = x.new_empty(x.shape)
    with on_device(x):
        _apply(x, None, y, y, weight, bias, mean, rstd, rms)
    return y


def _apply(
    x: Tensor,
    residual: Tensor | None,
    y: Tensor,
    total: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rms: bool,
) -> None:
    rows, channels = x.shape
    tile = _tile(channels)
    _apply_kernel[(triton.cdiv(rows, tile["BLOCK_R"]), triton.cdiv(channels, tile["BLOCK_C"]))](
        *_maps(x, residual, y, total, weight, bias),
        *(mean, rstd, rows, channels),
        **_given(residual=residual, weight=weight, bias=bias),
        RMS=rms,
        **tile,
    )


def _maps(x: Tensor, residual: Tensor | None, y: Tensor, total: Tensor, *vectors: Tensor | None) -> list[Tensor]:
    """What kernels take; where there is nothing, a pointer that nobody follows."""
    return [x, x if residual is None else residual, y, total, *(x if each is None else each for each in vectors)]


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
    """The contract of the reference's ``backward``."""
    rows, channels = x.shape
    grad_x = x.new_empty(x.shape if need_x else 0)
    grad_weight, grad_bias = (new(x, channels if need else 0) for need in (need_weight, need_bias))
    tile = _tile(channels)
    maps = (grad, x if grad_total is None else grad_total, x, grad_x, x if weight is None else weight, mean, rstd)
    options: dict[str, Any] = {**_given(total=grad_total, weight=weight), "RMS": rms}
    with on_device(x):
        if need_x and channels > LONGEST:
            _input_grad_kernel[(rows,)](*maps, channels, **options, **_long(channels))
        whole, sums_rows = need_x and channels <= LONGEST, need_weight or need_bias
        if whole or sums_rows:
            chunk, programs = _shared(triton.cdiv(rows, tile["BLOCK_R"]), tile["BLOCK_R"], sums_rows)
            sums = new(x, programs, 2, channels) if sums_rows else rstd
            needs = {"NEED_WEIGHT": need_weight, "NEED_BIAS": need_bias}
            _backward_kernel[(programs, triton.cdiv(channels, tile["BLOCK_C"]))](
                *(*maps, sums, rows, channels, chunk), **options, **needs, NEED_X=whole, **tile
            )
            if sums_rows:
                _finish_kernel[(triton.cdiv(channels, 32),)](
                    *(sums, grad_weight, grad_bias, channels, programs), **needs, BLOCK_C=32, BLOCK_S=32
                )
    return grad_x, grad_weight, grad_bias

"""batch_norm_act in Triton: two reductions, each partial sums and their merge, and two passes element by element.

What a program works on, and what it is told of its channels: see ``channelwise``.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_like
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


@triton.jit
def _place(unit, positions, units_an_image, BLOCK_P: tl.constexpr):
    """Image and positions of a unit, and which of the positions there are."""
    i_n = unit // units_an_image
    o_p = (unit % units_an_image) * BLOCK_P + tl.arange(0, BLOCK_P)
    return i_n, o_p[None, :], (o_p < positions)[None, :]


@triton.jit
def _mask(m_c, m_p, ALIGN_C: tl.constexpr, ALIGN_P: tl.constexpr):
    """Which elements of a unit there are; of ALIGN neighbours all or none."""
    mask = m_c[:, None] & m_p
    if ALIGN_C * ALIGN_P > 1:
        mask = tl.max_constancy(mask, (ALIGN_C, ALIGN_P))
    return mask


@triton.jit
def _offsets(i_n, o_c, o_p, stride_n, stride_c, stride_p, ALIGN_C: tl.constexpr, ALIGN_P: tl.constexpr):
    """Where they are. The compiler sees which strides are multiples of 16; of smaller numbers it is told here."""
    n = i_n * stride_n
    c = o_c * stride_c
    p = o_p * stride_p
    if ALIGN_C * ALIGN_P > 1:
        n = tl.multiple_of(n, ALIGN_C * ALIGN_P)
    if ALIGN_P > 1:
        c = tl.multiple_of(c, (ALIGN_P, ALIGN_P))
    if ALIGN_C > 1:
        p = tl.multiple_of(p, (ALIGN_C, ALIGN_C))
    return n + c + p


@triton.jit
def _stats_kernel(
    X_ptr,  # feature map, (N, C, P), any strides
    M_ptr,  # count, mean less the channel's first value, sum of squared differences from the mean, (splits, 3, C)
    channels,
    positions,
    units_an_image,
    units,
    chunk,  # units of a program
    stride_xn,
    stride_xc,
    stride_xp,
    ALIGN_C: tl.constexpr,  # channels and positions that stand together in all maps; one of the two is 1
    ALIGN_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    o_c, m_c = own_channels(channels, BLOCK_C)
    unit, end = own_units(units, chunk)
    origin = tl.load(X_ptr + o_c[:, None] * stride_xc, mask=m_c[:, None], other=0.0).to(tl.float32)
    # Every lane sums what differs from the first value it met, so that huge means cost no digits of the variance.
    i_n, o_p, m_p = _place(unit, positions, units_an_image, BLOCK_P)
    mask = _mask(m_c, m_p, ALIGN_C, ALIGN_P)
    offsets = _offsets(i_n, o_c[:, None], o_p, stride_xn, stride_xc, stride_xp, ALIGN_C, ALIGN_P)
    shift = tl.load(X_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    # A lane whose first unit ends before it has no first value, and takes that of the channel.
    shift = tl.where(m_p, shift, origin)
    sums = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    squares = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    counts = tl.zeros((1, BLOCK_P), dtype=tl.float32)
    # `while`: with numpy >= 2.5 the interpreter of Triton 3.6 cannot take the bound of a `range` from an argument.
    while unit < end:
        i_n, o_p, m_p = _place(unit, positions, units_an_image, BLOCK_P)
        mask = _mask(m_c, m_p, ALIGN_C, ALIGN_P)
        offsets = _offsets(i_n, o_c[:, None], o_p, stride_xn, stride_xc, stride_xp, ALIGN_C, ALIGN_P)
        x = tl.load(X_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        difference = tl.where(mask, x - shift, 0.0)
        sums += difference
        squares += difference * difference
        counts += m_p.to(tl.float32)
        unit += 1
    several = tl.maximum(counts, 1.0)
    means = tl.where(counts > 0, (shift - origin) + sums / several, 0.0)
    squares = squares - sums * (sums / several)
    squares = tl.where(squares < 0, 0.0, squares)  # by rounding; a NaN stays one
    count = tl.sum(counts, axis=1)
    mean = tl.sum(means * counts, axis=1) / count
    apart = tl.where(counts > 0, means - mean[:, None], 0.0)
    total = tl.sum(squares, axis=1) + tl.sum(apart * apart * counts, axis=1)
    M_ptr += tl.program_id(1).to(tl.int64) * 3 * channels + o_c
    tl.store(M_ptr, tl.zeros_like(mean) + count, mask=m_c)
    tl.store(M_ptr + channels, mean, mask=m_c)
    tl.store(M_ptr + 2 * channels, total, mask=m_c)


@triton.jit
def _finish_stats_kernel(
    X_ptr,  # feature map; its value (0, c, 0) is the origin of channel c
    M_ptr,  # (splits, 3, C)
    mean_ptr,  # (C,) float32
    var_ptr,  # (C,) float32; UPDATE: 1 / sqrt(var + eps)
    RM_ptr,  # running mean, (C,) float32, updated, or anything
    RV_ptr,  # running variance, (C,) float32, updated, or anything
    N_ptr,  # number of batches, (1,) int64, counted up, or anything
    momentum,
    eps,
    channels,
    splits,
    stride_xc,
    UPDATE: tl.constexpr,
    HAS_RUNNING_MEAN: tl.constexpr,
    HAS_RUNNING_VAR: tl.constexpr,
    HAS_BATCHES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,  # splits at a time
):
    o_c, m_c = own_channels(channels, BLOCK_C)
    o_s = tl.arange(0, BLOCK_S).to(tl.int64)[:, None]
    M_ptr += o_c[None, :]
    count = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    first = 0
    while first < splits:
        mask = (first + o_s < splits) & m_c[None, :]
        n = tl.load(M_ptr + (first + o_s) * 3 * channels, mask=mask, other=0.0)
        count += n
        weighted += n * tl.load(M_ptr + ((first + o_s) * 3 + 1) * channels, mask=mask, other=0.0)
        first += BLOCK_S
    count_all = tl.sum(count, axis=0)
    mean = tl.sum(weighted, axis=0) / count_all
    squares = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    first = 0
    while first < splits:
        mask = (first + o_s < splits) & m_c[None, :]
        n = tl.load(M_ptr + (first + o_s) * 3 * channels, mask=mask, other=0.0)
        apart = tl.load(M_ptr + ((first + o_s) * 3 + 1) * channels, mask=mask, other=0.0) - mean[None, :]
        squares += tl.load(M_ptr + ((first + o_s) * 3 + 2) * channels, mask=mask, other=0.0)
        squares += tl.where(mask, n * apart * apart, 0.0)
        first += BLOCK_S
    origin = tl.load(X_ptr + o_c * stride_xc, mask=m_c, other=0.0).to(tl.float32)
    mean += origin
    var = tl.sum(squares, axis=0) / count_all
    if HAS_RUNNING_MEAN:
        running = tl.load(RM_ptr + o_c, mask=m_c, other=0.0)
        tl.store(RM_ptr + o_c, (1 - momentum) * running + momentum * mean, mask=m_c)
    if HAS_RUNNING_VAR:
        running = tl.load(RV_ptr + o_c, mask=m_c, other=0.0)
        unbiased = var * (count_all / (count_all - 1))
        tl.store(RV_ptr + o_c, (1 - momentum) * running + momentum * unbiased, mask=m_c)
    if HAS_BATCHES:
        if tl.program_id(0) == 0:
            tl.store(N_ptr, tl.load(N_ptr) + 1)
    if UPDATE:
        var = 1 / tl.sqrt(var + eps)
    tl.store(mean_ptr + o_c, mean, mask=m_c)
    tl.store(var_ptr + o_c, var, mask=m_c)


@triton.jit
def _apply_kernel(
    X_ptr,  # feature map, (N, C, P), any strides
    R_ptr,  # residual, (N, C, P), any strides, or anything
    Y_ptr,  # (N, C, P), any strides
    mean_ptr,  # (C,) float32, as the three below
    rstd_ptr,
    W_ptr,  # weight, or anything
    B_ptr,  # bias, or anything
    slope,
    channels,
    positions,
    units_an_image,
    units,
    chunk,  # units of a program
    stride_xn,
    stride_xc,
    stride_xp,
    stride_rn,
    stride_rc,
    stride_rp,
    stride_yn,
    stride_yc,
    stride_yp,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN_C: tl.constexpr,  # channels and positions that stand together in all maps; one of the two is 1
    ALIGN_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    o_c, m_c = own_channels(channels, BLOCK_C)
    mean, _, scale, bias = factors(mean_ptr, rstd_ptr, W_ptr, B_ptr, o_c, m_c, HAS_WEIGHT, HAS_BIAS)
    o_c = o_c[:, None]
    unit, end = own_units(units, chunk)
    while unit < end:
        i_n, o_p, m_p = _place(unit, positions, units_an_image, BLOCK_P)
        mask = _mask(m_c, m_p, ALIGN_C, ALIGN_P)
        x_offsets = _offsets(i_n, o_c, o_p, stride_xn, stride_xc, stride_xp, ALIGN_C, ALIGN_P)
        x = tl.load(X_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
        z = (x - mean) * scale + bias
        if HAS_RESIDUAL:
            r_offsets = _offsets(i_n, o_c, o_p, stride_rn, stride_rc, stride_rp, ALIGN_C, ALIGN_P)
            z += tl.load(R_ptr + r_offsets, mask=mask, other=0.0).to(tl.float32)
        y = activated(z, z, slope, ACTIVATION).to(Y_ptr.dtype.element_ty)
        y_offsets = _offsets(i_n, o_c, o_p, stride_yn, stride_yc, stride_yp, ALIGN_C, ALIGN_P)
        tl.store(Y_ptr + y_offsets, y, mask=mask)
        unit += 1


@triton.jit
def _backward_kernel(
    G_ptr,  # gradient of y, (N, C, P), any strides
    X_ptr,  # feature map, (N, C, P), any strides
    R_ptr,  # residual, (N, C, P), any strides, or anything
    mean_ptr,  # (C,) float32, as the three below
    rstd_ptr,
    W_ptr,  # weight, or anything
    B_ptr,  # bias, or anything
    S_ptr,  # REDUCE: partial sums of g and of g (x - mean), (splits, 2, C) float32; else anything
    sum_g_ptr,  # (C,) float32, or anything
    sum_gx_ptr,  # (C,) float32, or anything
    DX_ptr,  # gradient of x, (N, C, P), or anything
    DR_ptr,  # gradient of the residual, with the strides of DX, or anything
    slope,
    count,  # N P
    channels,
    positions,
    units_an_image,
    units,
    chunk,  # units of a program
    stride_gn,
    stride_gc,
    stride_gp,
    stride_xn,
    stride_xc,
    stride_xp,
    stride_rn,
    stride_rc,
    stride_rp,
    stride_dn,
    stride_dc,
    stride_dp,
    REDUCE: tl.constexpr,  # make the sums; else the gradients
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SUMS: tl.constexpr,
    NEED_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALIGN_C: tl.constexpr,  # channels and positions that stand together in all maps; one of the two is 1
    ALIGN_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    o_c, m_c = own_channels(channels, BLOCK_C)
    mean, rstd, scale, bias = factors(mean_ptr, rstd_ptr, W_ptr, B_ptr, o_c, m_c, HAS_WEIGHT, HAS_BIAS)
    mean_g, inner = gradient_means(sum_g_ptr, sum_gx_ptr, rstd, count, o_c, m_c, HAS_SUMS)
    S_ptr += tl.program_id(1).to(tl.int64) * 2 * channels + o_c
    o_c = o_c[:, None]
    sum_g = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    sum_gx = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    unit, end = own_units(units, chunk)
    while unit < end:
        i_n, o_p, m_p = _place(unit, positions, units_an_image, BLOCK_P)
        mask = _mask(m_c, m_p, ALIGN_C, ALIGN_P)
        x_offsets = _offsets(i_n, o_c, o_p, stride_xn, stride_xc, stride_xp, ALIGN_C, ALIGN_P)
        x = tl.load(X_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
        g_offsets = _offsets(i_n, o_c, o_p, stride_gn, stride_gc, stride_gp, ALIGN_C, ALIGN_P)
        g = tl.load(G_ptr + g_offsets, mask=mask, other=0.0).to(tl.float32)
        difference = x - mean
        if ACTIVATION != "none":
            z = difference * scale + bias
            if HAS_RESIDUAL:
                r_offsets = _offsets(i_n, o_c, o_p, stride_rn, stride_rc, stride_rp, ALIGN_C, ALIGN_P)
                z += tl.load(R_ptr + r_offsets, mask=mask, other=0.0).to(tl.float32)
            g = activated(g, z, slope, ACTIVATION)
        if REDUCE:
            sum_g += g
            sum_gx += g * difference
        else:
            d_offsets = _offsets(i_n, o_c, o_p, stride_dn, stride_dc, stride_dp, ALIGN_C, ALIGN_P)
            if NEED_RESIDUAL:
                tl.store(DR_ptr + d_offsets, g.to(DR_ptr.dtype.element_ty), mask=mask)
            if HAS_SUMS:
                g = g - mean_g - difference * inner
            tl.store(DX_ptr + d_offsets, (g * scale).to(DX_ptr.dtype.element_ty), mask=mask)
        unit += 1
    if REDUCE:
        tl.store(S_ptr, tl.sum(sum_g, axis=1), mask=m_c)
        tl.store(S_ptr + channels, tl.sum(sum_gx, axis=1), mask=m_c)


class _Plan(Plan):
    """How programs share a map, and it and others of its shape as (N, C, P)."""

    def __init__(self, x: Tensor, reduces: bool) -> None:
        self.single = x.dim() == 2 or x.shape[2:].numel() == 1
        flat = self.flat(x)
        self.channels_last = flat.stride(1) == 1 and flat.stride(2) != 1
        super().__init__(*flat.shape, channels_last=self.channels_last, elements=2048, reduces=reduces)

    def flat(self, x: Tensor) -> Tensor:
        """A view where the positions have one common stride, a copy otherwise; (N, C) is one image of N positions."""
        if self.single:
            return x.flatten(1).t().unsqueeze(0)
        return x.flatten(2)

    def constants(self, *maps: Tensor) -> dict[str, int]:
        """Sizes of a unit, and how many neighbours stand together in all maps (N, C, P): 4 of 14x14 positions."""
        inner, outer = (1, 2) if self.channels_last else (2, 1)
        steps = [flat.stride(dim) for flat in maps for dim in (0, outer)]
        align = math.gcd(16, maps[0].shape[inner], *steps) if all(flat.stride(inner) == 1 for flat in maps) else 1
        align = 1 if align == 16 else align  # which the compiler sees
        return {
            "ALIGN_C": align if self.channels_last else 1,
            "ALIGN_P": 1 if self.channels_last else align,
            **self.blocks,
        }


def stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """The contract of the reference's ``stats``."""
    return _statistics(x, None, None, None, 0.0, 0.0, update=False)


def factors_(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The contract of the reference's ``factors_``."""
    return _statistics(x, running_mean, running_var, num_batches_tracked, momentum, eps, update=True)


def _statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batches: Tensor | None,
    momentum: float,
    eps: float,
    update: bool,
) -> tuple[Tensor, Tensor]:
    plan = _Plan(x, reduces=True)
    flat = plan.flat(x)
    partial = new(x, plan.splits, 3, plan.channels)
    mean, var = new(x, plan.channels), new(x, plan.channels)
    updated = (running_mean, running_var, batches)
    written = [mean if tensor is None else tensor for tensor in updated]
    grid, blocks = plan.finish
    with on_device(x):
        _stats_kernel[plan.grid](flat, partial, *plan.sizes, *flat.stride(), **plan.constants(flat))
        _finish_stats_kernel[grid](
            *(flat, partial, mean, var, *written, momentum, eps, plan.channels, plan.splits, flat.stride(1)),
            UPDATE=update,
            HAS_RUNNING_MEAN=running_mean is not None,
            HAS_RUNNING_VAR=running_var is not None,
            HAS_BATCHES=batches is not None,
            **blocks,
        )
    return mean, var


def apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
) -> Tensor:
    """The contract of the reference's ``apply``."""
    plan = _Plan(x, reduces=False)
    y = empty_like(x)
    flat, out = plan.flat(x), plan.flat(y)
    added = flat if residual is None else plan.flat(residual)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    with on_device(x):
        _apply_kernel[plan.grid](
            *(flat, added, out, mean, rstd, vector(weight, mean), vector(bias, mean), slope, *plan.sizes),
            *(*flat.stride(), *added.stride(), *out.stride()),
            HAS_RESIDUAL=residual is not None,
            **options(weight, bias, slope),
            **plan.constants(flat, added, out),
        )
    return y


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
    """The contract of the reference's ``reduce``."""
    plan = _Plan(x, reduces=True)
    partial = new(x, plan.splits, 2, plan.channels)
    with on_device(x):
        _backward(plan, grad, x, mean, rstd, weight, bias, residual, slope, partial=partial)
        return finish_sums(plan, partial, rstd)


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
    """The contract of the reference's ``input_grad``."""
    plan = _Plan(x, reduces=False)
    grad_x, grad_residual = empty_like(x), empty_like(x) if need_residual else x.new_empty(0)
    with on_device(x):
        _backward(
            *(plan, grad, x, mean, rstd, weight, bias, residual, slope),
            sums=(sum_g, sum_g_xhat),
            grads=(grad_x, grad_residual if need_residual else None),
        )
    return grad_x, grad_residual


def _backward(
    plan: _Plan,
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    slope: float,
    partial: Tensor | None = None,
    sums: tuple[Tensor | None, Tensor | None] = (None, None),
    grads: tuple[Tensor | None, Tensor | None] = (None, None),
) -> None:
    flat, flat_grad = plan.flat(x), plan.flat(grad)
    added = flat if residual is None or slope == 1 else plan.flat(residual)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    grad_x, grad_residual = (flat if g is None else plan.flat(g) for g in grads)
    _backward_kernel[plan.grid](
        *(flat_grad, flat, added, mean, rstd, vector(weight, mean), vector(bias, mean)),
        *(mean if partial is None else partial, vector(sums[0], mean), vector(sums[1], mean)),
        *(grad_x, grad_residual, slope, float(x.numel() // plan.channels), *plan.sizes),
        *(*flat_grad.stride(), *flat.stride(), *added.stride(), *grad_x.stride()),
        REDUCE=partial is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_SUMS=sums[0] is not None and sums[1] is not None,
        NEED_RESIDUAL=grads[1] is not None,
        **options(weight, bias, slope),
        **plan.constants(flat, flat_grad, added, grad_x),
    )

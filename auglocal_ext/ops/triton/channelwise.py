"""What the kernels of the BatchNorm ops share: a program has BLOCK_C channels, their factors, and a run of units.

A unit is BLOCK_P positions of one image; what a run of units adds up is one of the partial sums of its channels.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# Programs of a launch, and units of a program before a second one shares its work: the same on all GPUs, and so are the
# bits of a sum. Sums are few, for one program merges those of its channels. Where nothing is summed there are enough
# programs for some waves of the largest GPU, whose last one, half empty, then costs little.
PROGRAMS, LEAST_UNITS = 2048, 4
ELEMENTWISE_PROGRAMS, LEAST_ELEMENTWISE_UNITS = 8192, 2
MOST_UNITS = 512  # of a program that adds up in float32


@triton.jit
def own_channels(channels, BLOCK_C: tl.constexpr):
    """The program's channels, and which of them there are."""
    o_c = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    return o_c, o_c < channels


@triton.jit
def own_units(units, chunk):
    """The program's first unit, and the one after its last."""
    first = tl.program_id(1).to(tl.int64) * chunk
    return first, tl.minimum(first + chunk, units)


@triton.jit
def column(values_ptr, o_c, m_c, default, GIVEN: tl.constexpr):
    """Per-channel values as a column, or the default where there are none."""
    if GIVEN:
        values = tl.load(values_ptr + o_c, mask=m_c, other=0.0)
    else:
        values = tl.zeros_like(o_c).to(tl.float32) + default
    return values[:, None]


@triton.jit
def factors(mean_ptr, rstd_ptr, W_ptr, B_ptr, o_c, m_c, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr):
    """mean, rstd, rstd weight and bias as columns: z = (x - mean) (rstd weight) + bias."""
    mean = column(mean_ptr, o_c, m_c, 0.0, True)
    rstd = column(rstd_ptr, o_c, m_c, 0.0, True)
    scale = rstd * column(W_ptr, o_c, m_c, 1.0, HAS_WEIGHT)
    return mean, rstd, scale, column(B_ptr, o_c, m_c, 0.0, HAS_BIAS)


@triton.jit
def gradient_means(sum_g_ptr, sum_gx_ptr, rstd, count, o_c, m_c, HAS_SUMS: tl.constexpr):
    """The means of g, and of g xhat times rstd, as columns: what the statistics take from the gradient of x."""
    mean_g = column(sum_g_ptr, o_c, m_c, 0.0, HAS_SUMS) / count
    return mean_g, column(sum_gx_ptr, o_c, m_c, 0.0, HAS_SUMS) / count * rstd


@triton.jit
def activated(value, z, slope, ACTIVATION: tl.constexpr):
    """value act'(z): a NaN passes ReLU, which multiplies nothing by zero, and falls left in leaky ReLU."""
    if ACTIVATION == "relu":
        value = tl.where(z <= 0, 0.0, value)
    elif ACTIVATION == "leaky_relu":
        value = tl.where(z > 0, value, value * slope)
    return value


@triton.jit
def _finish_sums_kernel(
    S_ptr,  # (splits, 2, C)
    rstd_ptr,  # (C,) float32
    sum_g_ptr,  # (C,) float32
    sum_gx_ptr,  # (C,) float32, of g xhat
    channels,
    splits,
    BLOCK_C: tl.constexpr,
    BLOCK_S: tl.constexpr,  # splits at a time
):
    o_c, m_c = own_channels(channels, BLOCK_C)
    o_s = tl.arange(0, BLOCK_S).to(tl.int64)[:, None]
    sum_g = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    sum_gx = tl.zeros((BLOCK_S, BLOCK_C), dtype=tl.float32)
    first = 0
    while first < splits:
        mask = (first + o_s < splits) & m_c[None, :]
        offsets = (first + o_s) * 2 * channels + o_c[None, :]
        sum_g += tl.load(S_ptr + offsets, mask=mask, other=0.0)
        sum_gx += tl.load(S_ptr + offsets + channels, mask=mask, other=0.0)
        first += BLOCK_S
    rstd = tl.load(rstd_ptr + o_c, mask=m_c, other=0.0)
    tl.store(sum_g_ptr + o_c, tl.sum(sum_g, axis=0), mask=m_c)
    tl.store(sum_gx_ptr + o_c, tl.sum(sum_gx, axis=0) * rstd, mask=m_c)


class Plan:
    """How programs share a map of (images, channels, positions), ``elements`` of which are a unit."""

    def __init__(
        self, images: int, channels: int, positions: int, *, channels_last: bool, elements: int, reduces: bool
    ) -> None:
        block_c, block_p = _tile(channels, positions, channels_last, elements)
        units_an_image = triton.cdiv(positions, block_p)
        units, tiles = images * units_an_image, triton.cdiv(channels, block_c)
        if reduces:
            splits = min(triton.cdiv(PROGRAMS, tiles), triton.cdiv(units, LEAST_UNITS))
            splits = max(splits, triton.cdiv(units, MOST_UNITS))
        else:
            splits = min(triton.cdiv(ELEMENTWISE_PROGRAMS, tiles), triton.cdiv(units, LEAST_ELEMENTWISE_UNITS))
        chunk = triton.cdiv(units, splits)
        self.channels = channels
        self.splits = triton.cdiv(units, chunk)
        self.grid = (tiles, self.splits)
        self.sizes = (channels, positions, units_an_image, units, chunk)
        self.blocks = {"BLOCK_C": block_c, "BLOCK_P": block_p}
        self.finish = ((triton.cdiv(channels, 32),), {"BLOCK_C": 32, "BLOCK_S": 32})


def _tile(channels: int, positions: int, channels_last: bool, elements: int) -> tuple[int, int]:
    """Channels and positions of a unit: long along the dimension that lies together in memory."""
    channels, positions = triton.next_power_of_2(channels), triton.next_power_of_2(positions)
    if channels_last:
        block_c = min(elements // 16, channels)
        return block_c, min(elements // block_c, positions)
    block_p = min(elements // 2, positions)
    return min(elements // block_p, channels), block_p


def finish_sums(plan: Plan, partial: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """sum_g and sum_g_xhat (C,) of the partial sums of g and g (x - mean), (splits, 2, C)."""
    sum_g, sum_g_xhat = new(partial, plan.channels), new(partial, plan.channels)
    grid, blocks = plan.finish
    _finish_sums_kernel[grid](partial, rstd.contiguous(), sum_g, sum_g_xhat, plan.channels, plan.splits, **blocks)
    return sum_g, sum_g_xhat


def on_device(x: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, whatever the tensors' device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def vector(values: Tensor | None, otherwise: Tensor) -> Tensor:
    """Per-channel values as kernels read them; where there are none, a pointer that nobody follows."""
    return otherwise if values is None else values.to(torch.float32).contiguous()


def new(x: Tensor, *shape: int) -> Tensor:
    """float32 memory beside x."""
    return x.new_empty(shape, dtype=torch.float32)


def options(weight: Tensor | None, bias: Tensor | None, slope: float) -> dict[str, Any]:
    """The constants of a kernel that say which factors there are and what the activation is."""
    activation = {0.0: "relu", 1.0: "none"}.get(slope, "leaky_relu")
    return {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "ACTIVATION": activation}

"""supervised_contrast in Triton: normalise; for blocks of rows a library product, rows, library products; finish.

With products s = z z^T a shifted logit is (s - largest of the row) / t, and the gradient of z is
(G z + G^T z) / (t |A|), where G is softmax minus the share of each positive and |A| is known after its last row.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.supervised_contrast import EPS, ROWS, Outputs

BLOCK = 1024  # most elements of a row that a program takes at a time


@triton.jit
def _normalise_kernel(
    F_ptr,  # features, (N, D), any strides
    Z_ptr,  # normalised, (N, D) float32
    R_ptr,  # norms, (N,) float32
    width,
    least_norm,
    stride_fn,
    stride_fd,
    BLOCK_D: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    F_ptr += i_n * stride_fn
    squares = tl.zeros((BLOCK_D,), dtype=tl.float32)
    # `while`: with numpy >= 2.5 the interpreter of Triton 3.6 cannot take the bound of a `range` from an argument.
    first = 0
    while first < width:
        features = tl.load(F_ptr + (first + o_d) * stride_fd, mask=first + o_d < width, other=0.0).to(tl.float32)
        squares += features * features
        first += BLOCK_D
    norm = tl.sqrt(tl.sum(squares, axis=0))
    tl.store(R_ptr + i_n, norm)
    divisor = tl.where(norm < least_norm, least_norm, norm)
    first = 0
    while first < width:
        mask = first + o_d < width
        features = tl.load(F_ptr + (first + o_d) * stride_fd, mask=mask, other=0.0).to(tl.float32)
        tl.store(Z_ptr + i_n * width + first + o_d, features / divisor, mask=mask)
        first += BLOCK_D


@triton.jit
def _others(S_ptr, T_ptr, o_a, i_n, label, images, ignore_index, stride_t):
    """Products of the row with images that stand in its sums, whether they do, and whether they are positives."""
    inside = o_a < images
    other = tl.load(T_ptr + o_a * stride_t, mask=inside, other=0)
    stands = inside & (other != ignore_index) & (o_a != i_n)
    return tl.load(S_ptr + o_a, mask=inside, other=0.0), stands, stands & (other == label)


@triton.jit
def _rows_kernel(
    S_ptr,  # rows of the matrix of pairs, (rows, N) float32, products on entry, then G
    T_ptr,  # labels, (N,) int64
    L_ptr,  # losses, (N,) float32
    A_ptr,  # whether an image is an anchor, (N,) int64
    first_row,
    images,
    temperature,
    ignore_index,
    stride_t,
    NEED_GRAD: tl.constexpr,
    BLOCK_A: tl.constexpr,  # images a step
):
    i_r = tl.program_id(0).to(tl.int64)
    i_n = first_row + i_r
    o_a = tl.arange(0, BLOCK_A).to(tl.int64)
    S_ptr += i_r * images
    label = tl.load(T_ptr + i_n * stride_t)

    values = tl.full((BLOCK_A,), float("-inf"), dtype=tl.float32)
    counts = tl.zeros((BLOCK_A,), dtype=tl.int32)
    first = 0
    while first < images:
        product, stands, positive = _others(S_ptr, T_ptr, first + o_a, i_n, label, images, ignore_index, stride_t)
        values = tl.where(stands & ~(product <= values), product, values)  # a NaN comes through
        counts += positive.to(tl.int32)
        first += BLOCK_A
    count = tl.sum(counts, axis=0)
    anchor = (count > 0) & (label != ignore_index)
    largest = tl.max(values, axis=0)

    sums = tl.zeros((BLOCK_A,), dtype=tl.float32)
    positives = tl.zeros((BLOCK_A,), dtype=tl.float32)
    first = 0
    while first < images:
        product, stands, positive = _others(S_ptr, T_ptr, first + o_a, i_n, label, images, ignore_index, stride_t)
        shifted = (product - largest) / temperature
        sums += tl.where(stands, tl.exp(shifted), 0.0)
        positives += tl.where(positive, shifted, 0.0)
        first += BLOCK_A
    total = tl.sum(sums, axis=0)
    share = 1.0 / tl.maximum(count, 1).to(tl.float32)
    loss = tl.log(total) - tl.sum(positives, axis=0) * share
    tl.store(L_ptr + i_n, tl.where(anchor, loss, 0.0))
    tl.store(A_ptr + i_n, anchor.to(tl.int64))

    if NEED_GRAD:
        first = 0
        while first < images:
            product, stands, positive = _others(S_ptr, T_ptr, first + o_a, i_n, label, images, ignore_index, stride_t)
            gradient = tl.exp((product - largest) / temperature) / total - tl.where(positive, share, 0.0)
            tl.store(S_ptr + first + o_a, tl.where(stands & anchor, gradient, 0.0), mask=first + o_a < images)
            first += BLOCK_A


@triton.jit
def _total_kernel(
    L_ptr,  # losses, (N,) float32
    A_ptr,  # whether an image is an anchor, (N,) int64
    loss_ptr,  # () float32
    W_ptr,  # 1 / (t |A|), () float32
    images,
    temperature,
    BLOCK_N: tl.constexpr,
):
    loss = tl.zeros((BLOCK_N,), dtype=tl.float32)
    anchors = tl.zeros((BLOCK_N,), dtype=tl.int64)
    first = 0
    while first < images:
        o_n = first + tl.arange(0, BLOCK_N).to(tl.int64)
        loss += tl.load(L_ptr + o_n, mask=o_n < images, other=0.0)
        anchors += tl.load(A_ptr + o_n, mask=o_n < images, other=0)
        first += BLOCK_N
    count = tl.maximum(tl.sum(anchors, axis=0), 1).to(tl.float32)
    tl.store(loss_ptr, tl.sum(loss, axis=0) / count)
    tl.store(W_ptr, 1.0 / (temperature * count))


@triton.jit
def _input_grad_kernel(
    D_ptr,  # gradient of z times t |A|, then of the features, (N, D) float32
    Z_ptr,  # normalised, (N, D) float32
    R_ptr,  # norms, (N,) float32
    W_ptr,  # 1 / (t |A|), () float32
    width,
    least_norm,
    BLOCK_D: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    D_ptr += i_n * width
    Z_ptr += i_n * width
    products = tl.zeros((BLOCK_D,), dtype=tl.float32)
    first = 0
    while first < width:
        mask = first + o_d < width
        dz = tl.load(D_ptr + first + o_d, mask=mask, other=0.0)
        products += dz * tl.load(Z_ptr + first + o_d, mask=mask, other=0.0)
        first += BLOCK_D
    norm = tl.load(R_ptr + i_n)
    short = norm < least_norm
    # A row shorter than that is divided by a constant, and z moves along itself too.
    inner = tl.where(short, 0.0, tl.sum(products, axis=0))
    divisor = tl.where(short, least_norm, norm)
    scale = tl.load(W_ptr)
    first = 0
    while first < width:
        mask = first + o_d < width
        dz = tl.load(D_ptr + first + o_d, mask=mask, other=0.0)
        z = tl.load(Z_ptr + first + o_d, mask=mask, other=0.0)
        tl.store(D_ptr + first + o_d, scale * ((dz - z * inner) / divisor), mask=mask)
        first += BLOCK_D


def forward(features: Tensor, target: Tensor, temperature: float, ignore_index: int, need_grad: bool) -> Outputs:
    """The contract of the reference's ``forward``, for float16, bfloat16 and float32."""
    images, width = features.shape
    block_d = min(BLOCK, triton.next_power_of_2(width))
    block_a = min(BLOCK, triton.next_power_of_2(images))

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=features.device)

    # Triton launches on the current device, whatever the tensors' device.
    with torch.cuda.device(features.device) if features.is_cuda else nullcontext():
        z, norms = new(images, width), new(images)
        _normalise_kernel[(images,)](
            *(features, z, norms, width, EPS, *features.stride()),
            BLOCK_D=block_d,
        )
        losses, anchors = new(images), new(images, dtype=torch.int64)
        dz = torch.zeros_like(z) if need_grad else new(0)
        for first in range(0, images, ROWS):
            own = z[first : first + ROWS]
            pairs = own @ z.t()
            _rows_kernel[(len(own),)](
                *(pairs, target, losses, anchors, first, images, temperature, ignore_index, target.stride(0)),
                NEED_GRAD=need_grad,
                BLOCK_A=block_a,
            )
            if need_grad:
                dz[first : first + ROWS].addmm_(pairs, z)
                dz.addmm_(pairs.t(), own)
            del pairs  # before the next block's are made
        loss, scale = new(), new()
        _total_kernel[(1,)](losses, anchors, loss, scale, images, temperature, BLOCK_N=256)
        if need_grad:
            _input_grad_kernel[(images,)](dz, z, norms, scale, width, EPS, BLOCK_D=block_d)
    return loss, dz

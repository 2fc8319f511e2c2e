"""pooled_cross_entropy in Triton: pool + count labels, library product, rows, library products, finish.

The sum over the P positions is kept instead of their mean: logits = (sums W^T) / P + b, and with d = dlogits / P the
gradients are d W (of the pooled feature, per position), d^T sums (of W) and P sum_n d (of b).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.pooled_cross_entropy import Outputs


@triton.jit
def _pool_kernel(
    X_ptr,  # feature map, (N, C, P), any strides
    S_ptr,  # sums over the positions, (N, C) float32
    T_ptr,  # labels, (N,) int64
    V_ptr,  # number of labels that count, or 1, () float32
    images,
    channels,
    positions,
    classes,
    ignore_index,
    stride_xn,
    stride_xc,
    stride_xp,
    stride_t,
    MEAN: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,  # labels a step
):
    i_n = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    o_p = tl.arange(0, BLOCK_P).to(tl.int64)
    m_c = o_c < channels
    X_ptr += i_n * stride_xn
    sums = tl.zeros((BLOCK_C, BLOCK_P), dtype=tl.float32)
    # `while`: with numpy >= 2.5 the interpreter of Triton 3.6 cannot take the bound of a `range` from an argument.
    first = 0
    while first < positions:
        m_p = first + o_p < positions
        offsets = o_c[:, None] * stride_xc + (first + o_p)[None, :] * stride_xp
        sums += tl.load(X_ptr + offsets, mask=m_c[:, None] & m_p[None, :], other=0.0).to(tl.float32)
        first += BLOCK_P
    tl.store(S_ptr + i_n * channels + o_c, tl.sum(sums, axis=1), mask=m_c)

    # One program counts the labels as well: nobody needs the count before the launch after this one.
    if (i_n == 0) & (tl.program_id(1) == 0):
        count = tl.zeros((BLOCK_N,), dtype=tl.int32)
        first = 0
        while first < images:
            o_n = first + tl.arange(0, BLOCK_N).to(tl.int64)
            m_n = o_n < images
            label = tl.load(T_ptr + o_n * stride_t, mask=m_n, other=-1)
            count += (m_n & (label >= 0) & (label < classes) & (label != ignore_index)).to(tl.int32)
            first += BLOCK_N
        if MEAN:
            tl.store(V_ptr, tl.sum(count, axis=0).to(tl.float32))
        else:
            tl.store(V_ptr, 1.0)


@triton.jit
def _rows_kernel(
    Z_ptr,  # logits, (N, K) float32, products on entry
    B_ptr,  # bias, (K,) float32, or anything
    T_ptr,  # labels, (N,) int64
    V_ptr,  # number of labels that count, or 1, () float32
    D_ptr,  # dlogits / P, (N, K) float32, or anything
    L_ptr,  # losses, (N,) float32
    H_ptr,  # top-1 hits, (N,) int64
    classes,
    positions,
    ignore_index,
    smoothing,
    stride_t,
    HAS_BIAS: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    BLOCK_K: tl.constexpr,  # at least K
):
    i_n = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < classes
    label = tl.load(T_ptr + i_n * stride_t)
    counted = (label >= 0) & (label < classes) & (label != ignore_index)

    logits = tl.load(Z_ptr + i_n * classes + o_k, mask=m_k, other=0.0) / positions
    if HAS_BIAS:
        logits += tl.load(B_ptr + o_k, mask=m_k, other=0.0)
    tl.store(Z_ptr + i_n * classes + o_k, logits, mask=m_k)

    logits = tl.where(m_k, logits, float("-inf"))
    largest = tl.max(logits, axis=0)
    hit = tl.argmax(logits, axis=0, tie_break_left=True).to(tl.int64) == label
    exponentials = tl.exp(logits - largest)
    total = tl.sum(exponentials, axis=0)
    log_sum = tl.log(total)
    is_label = o_k == label
    shifted = tl.where(m_k, logits - largest, 0.0)
    loss = (1 - smoothing) * (log_sum - tl.sum(tl.where(is_label, shifted, 0.0), axis=0))
    if smoothing > 0:
        loss += smoothing * (log_sum - tl.sum(shifted, axis=0) / classes)
    tl.store(L_ptr + i_n, tl.where(counted, loss, 0.0))
    tl.store(H_ptr + i_n, (hit & counted).to(tl.int64))

    if NEED_GRAD:
        scale = 1.0 / (tl.load(V_ptr) * positions)
        share = smoothing / classes
        p = exponentials / total
        gradient = tl.where(is_label, (p - 1) + (smoothing - share), p - share)
        tl.store(D_ptr + i_n * classes + o_k, tl.where(counted, scale * gradient, 0.0), mask=m_k)


@triton.jit
def _finish_kernel(
    L_ptr,  # losses, (N,) float32
    H_ptr,  # top-1 hits, (N,) int64
    V_ptr,  # number of labels that count, or 1, () float32
    D_ptr,  # dlogits / P, (N, K) float32, or anything
    loss_ptr,  # () float32
    correct_ptr,  # () int64
    DB_ptr,  # gradient of the bias, (K,) float32, or anything
    images,
    classes,
    positions,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Program 0 sums losses and hits; each further one sums BLOCK_K columns of D.
    first = 0
    if tl.program_id(0) == 0:
        loss = tl.zeros((BLOCK_N,), dtype=tl.float32)
        hits = tl.zeros((BLOCK_N,), dtype=tl.int64)
        while first < images:
            o_n = first + tl.arange(0, BLOCK_N).to(tl.int64)
            loss += tl.load(L_ptr + o_n, mask=o_n < images, other=0.0)
            hits += tl.load(H_ptr + o_n, mask=o_n < images, other=0)
            first += BLOCK_N
        tl.store(loss_ptr, tl.sum(loss, axis=0) / tl.load(V_ptr))
        tl.store(correct_ptr, tl.sum(hits, axis=0))
    else:
        o_k = (tl.program_id(0) - 1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
        gradient = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
        while first < images:
            o_n = first + tl.arange(0, BLOCK_N).to(tl.int64)
            mask = (o_n < images)[:, None] & (o_k < classes)[None, :]
            gradient += tl.load(D_ptr + o_n[:, None] * classes + o_k[None, :], mask=mask, other=0.0)
            first += BLOCK_N
        tl.store(DB_ptr + o_k, tl.sum(gradient, axis=0) * positions, mask=o_k < classes)


def _tile(flat: Tensor) -> tuple[int, int]:
    """Channels and positions a program takes at a time: long along the dimension that lies together in memory."""
    channels, positions = (triton.next_power_of_2(size) for size in flat.shape[1:])
    if flat.stride(1) == 1 and positions > 1:  # channels-last
        block_c = min(128, channels)
        return block_c, min(2048 // block_c, positions)
    block_p = min(512, positions)
    return min(2048 // block_p, channels), block_p


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> Outputs:
    """The contract of the reference's ``forward``, for float16, bfloat16 and float32."""
    # A view where the positions have one common stride, a contiguous copy otherwise.
    flat = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    images, channels, positions = flat.shape
    classes = weight.shape[0]
    need_bias = need_bias and bias is not None
    need_any = need_x or need_weight or need_bias
    wide_weight = weight.to(torch.float32)
    wide_bias = None if bias is None else bias.to(torch.float32).contiguous()

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    # Triton launches on the current device, whatever the tensors' device.
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        sums, count = new(images, channels), new()
        block_c, block_p = _tile(flat)
        _pool_kernel[(images, triton.cdiv(channels, block_c))](
            *(flat, sums, target, count),
            *(images, channels, positions, classes, ignore_index, *flat.stride(), target.stride(0)),
            MEAN=mean,
            BLOCK_C=block_c,
            BLOCK_P=block_p,
            BLOCK_N=256,
        )
        logits = sums @ wide_weight.t()
        d = new(images if need_any else 0, classes)
        losses, hits = new(images), new(images, dtype=torch.int64)
        _rows_kernel[(images,)](
            *(logits, logits if wide_bias is None else wide_bias, target, count, d, losses, hits),
            *(classes, positions, ignore_index, label_smoothing, target.stride(0)),
            HAS_BIAS=wide_bias is not None,
            NEED_GRAD=need_any,
            BLOCK_K=triton.next_power_of_2(classes),
        )
        loss, correct, grad_bias = new(), new(dtype=torch.int64), new(classes if need_bias else 0)
        block_k = 32
        _finish_kernel[(1 + (triton.cdiv(classes, block_k) if need_bias else 0),)](
            *(losses, hits, count, d, loss, correct, grad_bias, images, classes, positions),
            BLOCK_N=128,
            BLOCK_K=block_k,
        )
    return (
        loss,
        logits,
        correct,
        d @ wide_weight if need_x else new(0),
        d.t() @ sums if need_weight else new(0),
        grad_bias,
    )

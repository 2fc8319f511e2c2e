"""reconstruction_loss in Triton: loss and gradient element by element with a sum for each program, then their mean."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_like

BLOCK = 1024  # elements of a program; the same on all GPUs, and so are the bits of the sum


@triton.jit
def _pixels_kernel(
    X_ptr,  # logits, (N, C, P), any strides
    I_ptr,  # the network's input, (N, C, P), any strides
    M_ptr,  # mean, (C,) float32
    S_ptr,  # std, (C,) float32
    G_ptr,  # sigmoid(logits) - pixels, dense in the order that is walked, or anything
    L_ptr,  # sums of losses, (programs,) float32
    elements,  # of an image
    inner,  # of a row of them: positions, or in channels-last maps channels
    blocks,  # of an image
    stride_xn,
    stride_xo,
    stride_xi,
    stride_in,
    stride_io,
    stride_ii,
    CHANNELS_LAST: tl.constexpr,
    DENSE_X: tl.constexpr,  # whether an image's elements lie one after the other in the order
    DENSE_I: tl.constexpr,
    NEED_GRAD: tl.constexpr,
    WIDE: tl.constexpr,  # whether places in an image need 64 bits, whose division takes long
    BLOCK: tl.constexpr,
):
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    o_e = (block.to(tl.int64) if WIDE else block) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    o_o, o_i = (o_e // inner).to(tl.int64), (o_e % inner).to(tl.int64)
    o_c = o_i if CHANNELS_LAST else o_o
    offsets = o_e if DENSE_X else o_o * stride_xo + o_i * stride_xi
    x = tl.load(X_ptr + i_n * stride_xn + offsets, mask=m_e, other=0.0).to(tl.float32)
    offsets = o_e if DENSE_I else o_o * stride_io + o_i * stride_ii
    image = tl.load(I_ptr + i_n * stride_in + offsets, mask=m_e, other=0.0).to(tl.float32)

    pixel = image * tl.load(S_ptr + o_c, mask=m_e, other=0.0) + tl.load(M_ptr + o_c, mask=m_e, other=0.0)
    pixel = tl.where(pixel < 0, 0.0, tl.where(pixel > 1, 1.0, pixel))  # a NaN stays one
    # With e = exp(-|x|): |x| (distance from the end of [0, 1] that the sign of x points to) + log(1 + e), the logarithm
    # as 2 artanh(e / (2 + e)), which keeps its digits where e is tiny.
    size = tl.abs(x)
    e = tl.exp(-size)
    wrong = e / (1 + e)
    distance = tl.where(x < 0, pixel, 1 - pixel)
    s = e / (2 + e)
    square = s * s
    series = 2 / 9 + square * (2 / 11 + square * (2 / 13))
    loss = size * distance + s * (2 + square * (2 / 3 + square * (2 / 5 + square * (2 / 7 + square * series))))
    tl.store(L_ptr + tl.program_id(0), tl.sum(tl.where(m_e, loss, 0.0), axis=0))
    if NEED_GRAD:
        grad = tl.where(x < 0, wrong - pixel, distance - wrong)
        tl.store(G_ptr + i_n * elements + o_e, grad, mask=m_e)


@triton.jit
def _mean_kernel(
    L_ptr,  # sums of losses, (programs,) float32
    loss_ptr,  # () float32
    programs,
    count,  # of elements, a float32
    BLOCK: tl.constexpr,
):
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    # `while`: with numpy >= 2.5 the interpreter of Triton 3.6 cannot take the bound of a `range` from an argument.
    first = 0
    while first < programs:
        o_l = first + tl.arange(0, BLOCK).to(tl.int64)
        total += tl.load(L_ptr + o_l, mask=o_l < programs, other=0.0)
        first += BLOCK
    tl.store(loss_ptr, tl.sum(total, axis=0) / count)


def forward(logits: Tensor, image: Tensor, mean: Tensor, std: Tensor, need_grad: bool) -> tuple[Tensor, Tensor]:
    """The contract of the reference's ``forward``, for logits in float16, bfloat16 and float32."""
    # Views where the positions have one common stride, contiguous copies otherwise.
    maps = [tensor.flatten(2) for tensor in (logits, image)]
    channels_last = not logits.is_contiguous() and logits.stride(1) == 1  # and the gradient with them
    if channels_last:
        maps = [tensor.mT for tensor in maps]
    images, outer, inner = maps[0].shape
    blocks = triton.cdiv(outer * inner, BLOCK)
    dense = [(inner == 1 or step[2] == 1) and (outer == 1 or step[1] == inner) for step in (m.stride() for m in maps)]
    grad = empty_like(logits) if need_grad else logits.new_empty(0)
    loss = logits.new_empty((), dtype=torch.float32)
    sums = logits.new_empty(images * blocks, dtype=torch.float32)
    # Triton launches on the current device, whatever the tensors' device.
    with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
        _pixels_kernel[(images * blocks,)](
            *(*maps, mean.to(torch.float32).contiguous(), std.to(torch.float32).contiguous()),
            *(grad, sums, outer * inner, inner, blocks, *maps[0].stride(), *maps[1].stride()),
            CHANNELS_LAST=channels_last,
            DENSE_X=dense[0],
            DENSE_I=dense[1],
            NEED_GRAD=need_grad,
            WIDE=outer * inner + BLOCK > 2**31,
            BLOCK=BLOCK,
        )
        _mean_kernel[(1,)](sums, loss, len(sums), float(logits.numel()), BLOCK=BLOCK)
    return loss, grad

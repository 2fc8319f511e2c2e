"""Linear layer and cross-entropy by torch's own kernels, some rows at a time, so that the logits never exist at once.

A chunk of rows takes one buffer: its logits become exponentials, then the logits' gradient, in place. How many rows a
chunk has follows from bytes, see :func:`chunk_rows`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.linear_cross_entropy import Outputs, kept

#: Fewer rows than these leave the matrix products waiting for memory: each reads the whole weight.
LEAST_ROWS = 128


def chunk_rows(rows: int, width: int, classes: int, itemsize: int, least: int = 0) -> int:
    """How many rows' float32 logits take as many bytes as all hidden states; at least ``LEAST_ROWS`` and ``least``.

    Args:
        rows: R.
        width: C.
        classes: V.
        itemsize: bytes of an element of the hidden states.
    """
    fitting = rows * width * itemsize // (4 * classes)
    return min(rows, max(LEAST_ROWS, least, fitting))


def forward(
    x: Tensor,  # hidden states, (R, C)
    weight: Tensor,  # (V, C)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (R,) int64
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    product: torch.dtype,  # to which the factors of matrix products are rounded; the products are in float32 or float64
    need_x: bool,  # whose gradients are made
    need_weight: bool,
    need_bias: bool,
) -> Outputs:
    """As the reference's ``forward``."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows, classes = len(x), len(weight)
    counts = (target >= 0) & (target < classes) & (target != ignore_index)
    label = torch.where(counts, target, 0)[:, None]
    divisor = counts.sum().clamp(min=1)
    # In float16 the gradient of a mean over many rows would underflow: it is divided after the products.
    late = product == torch.float16
    share = counts.to(wide) if late else counts / divisor.to(wide)

    factor = weight.to(product)
    wide_bias = None if bias is None else bias.to(wide)
    need_any = need_x or need_weight or need_bias
    loss, nll = x.new_zeros((), dtype=wide), x.new_zeros((), dtype=wide)
    correct = target.new_zeros(())
    grad_x = x.new_empty((rows, x.shape[1]) if need_x else (0,), dtype=kept(x.dtype))
    grad_weight = weight.new_zeros(weight.shape if need_weight else (0,), dtype=wide)
    grad_bias = weight.new_zeros((classes,) if need_bias else (0,), dtype=wide)

    step = chunk_rows(rows, x.shape[1], classes, x.element_size())
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        part, wanted, counted = x[chunk].to(product), label[chunk], counts[chunk]
        logits = _matmul(part, factor.t(), wide)
        if wide_bias is not None:
            logits.add_(wide_bias)
        at_label = logits.gather(1, wanted)[:, 0]
        mean = logits.mean(1) if label_smoothing else None
        largest, found = logits.max(1)
        logits.sub_(largest[:, None]).exp_()
        sums = logits.sum(1)
        total = sums.log().add_(largest)
        losses = total - at_label
        correct += (counted & (found == wanted[:, 0])).sum()
        nll += torch.where(counted, losses, 0).sum()
        if mean is not None:
            losses = losses.mul_(1 - label_smoothing).add_(total - mean, alpha=label_smoothing)
        if z_loss:
            losses = losses.addcmul_(total, total, value=z_loss)
        loss += torch.where(counted, losses, 0).sum()
        if not need_any:
            del logits  # before the next chunk's are made
            continue
        weighted = share[chunk]
        dlogits = logits.mul_(((1 + 2 * z_loss * total) * weighted / sums)[:, None])
        del logits
        if label_smoothing:
            dlogits.sub_((weighted * (label_smoothing / classes))[:, None])
        dlogits.scatter_add_(1, wanted, (weighted * (label_smoothing - 1))[:, None])
        if need_bias:
            grad_bias += dlogits.sum(0)
        dlogits = dlogits.to(product)
        if need_x:
            grad = _matmul(dlogits, factor, wide)
            grad_x[chunk] = grad.div_(divisor) if late else grad
        if need_weight:
            _add_matmul(grad_weight, dlogits.t(), part)
        del dlogits
    if late:
        grad_weight.div_(divisor)
        grad_bias.div_(divisor)
    return loss / divisor, correct, nll, grad_x, grad_weight.to(kept(weight.dtype)), grad_bias


def _matmul(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """The matrix product of two factors of one dtype, summed and returned in ``wide``."""
    if a.dtype == wide:
        return torch.mm(a, b)
    if a.is_cuda:
        return torch.mm(a, b, out_dtype=wide)
    return torch.mm(a.to(wide), b.to(wide))


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the product of two factors of one dtype to ``total``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))

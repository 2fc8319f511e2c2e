"""Linear layer and cross-entropy on a CPU: torch's matrix products, and one compiled pass over the rows between them.

As with ``aten`` some rows at a time; their logits become their gradient in place. They take about as many bytes as
the hidden states or the weight do in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..aten.linear_cross_entropy import chunk_rows
from ..reference.linear_cross_entropy import Outputs, kept
from ..registry import kernel

#: Multiplications of a problem that one compiled call solves sooner than several operators do.
SMALL = 2**14
#: With fewer rows than these the library's products take longer, at 128 up to half as long again.
FULL_SPEED = 512


def is_small(rows: int, weight: Tensor, label_smoothing: float, z_loss: float) -> bool:
    """Whether ``linear_cross_entropy_small`` takes the problem."""
    return z_loss == label_smoothing == 0 and rows * weight.numel() <= SMALL


def forward(
    x: Tensor,  # hidden states, (R, C)
    weight: Tensor,  # (V, C)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (R,) int64
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    product: torch.dtype,  # bfloat16: to which the factors are rounded; otherwise they are not
    need_x: bool,  # whose gradients are made
    need_weight: bool,
    need_bias: bool,
) -> Outputs:
    """As the reference's ``forward``. Logits are float32 (float64); a product that is a gradient may be rounded."""
    if is_small(len(x), weight, label_smoothing, z_loss):
        options = ignore_index, label_smoothing, z_loss, product
        made: Outputs = kernel("linear_cross_entropy_small", "cpu")(
            *(x, weight, bias, target, *options, need_x, need_weight, need_bias)
        )
        return made
    rows_ = kernel("linear_cross_entropy_rows_", "cpu")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    low = product == torch.bfloat16
    rows, classes = len(x), len(weight)
    target = target.contiguous()
    counted = kernel("linear_cross_entropy_counted", "cpu")(target, classes, ignore_index)
    divisor = max(counted, 1)

    factor = weight.to(product if low else wide).contiguous()
    wide_bias = None if bias is None else bias.to(wide).contiguous()
    need_any = need_x or need_weight or need_bias
    totals = x.new_zeros(3, dtype=torch.float64)  # loss, nll, correct
    grad_x = x.new_empty((rows, x.shape[1]) if need_x else (0,), dtype=kept(x.dtype))
    grad_weight = weight.new_empty(weight.shape if need_weight else (0,), dtype=kept(weight.dtype))
    grad_bias = x.new_zeros((classes,) if need_bias else (0,), dtype=wide)

    step = chunk_rows(rows, x.shape[1], classes, 4, least=min(x.shape[1], FULL_SPEED))
    # The gradient of the weight is summed in `wide`, unless there is one chunk alone.
    total = grad_weight if grad_weight.dtype == wide or step >= rows else torch.empty_like(grad_weight, dtype=wide)
    buffer = x.new_empty((step, classes), dtype=wide)
    narrow = x.new_empty((step, classes), dtype=product) if low and (need_x or need_weight) else None
    for start in range(0, rows, step):
        chunk = slice(start, min(start + step, rows))
        size = chunk.stop - start
        whole = size == rows
        part, labels = (x, target) if whole else (x[chunk], target[chunk])
        part, logits = part.to(factor.dtype).contiguous(), buffer if whole else buffer[:size]
        dlogits = logits if narrow is None else narrow if whole else narrow[:size]
        _logits(part, factor, logits)
        rows_(
            *(logits, wide_bias, labels, ignore_index, label_smoothing, z_loss, 1 / divisor, need_any),
            *(None if narrow is None else dlogits, grad_bias if need_bias else None, totals),
        )
        if need_x:
            _multiply(dlogits, factor, grad_x if whole else grad_x[chunk])
        if need_weight and (start == 0 or total.dtype == dlogits.dtype):
            _multiply(dlogits.t(), part, total, add=start > 0)
        elif need_weight:
            total += dlogits.t() @ part
    if need_weight and total is not grad_weight:
        grad_weight.copy_(total)
    results = kernel("linear_cross_entropy_results", "cpu")(totals, divisor, wide == torch.float64)
    return *results, grad_x, grad_weight, grad_bias


def _logits(part: Tensor, factor: Tensor, logits: Tensor) -> None:
    if part.dtype == logits.dtype:
        torch.mm(part, factor.t(), out=logits)
    elif not kernel("linear_cross_entropy_logits_", "cpu")(logits, part, factor):
        torch.mm(part.to(logits.dtype), factor.to(logits.dtype).t(), out=logits)


def _multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """``out`` becomes, or gains, the product of two factors of one dtype, in which it is made."""
    if add:
        out.addmm_(a, b)
    elif a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)

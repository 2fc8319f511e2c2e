"""Linear layer and cross-entropy in plain PyTorch, with all logits: the formula that every provider keeps.

What every provider does: the gradients are made in the forward pass, and backward only scales them. Until then that of
a float16 input stays in float32, since it would underflow. A bfloat16 gradient has the range of float32 and is stored
as it is. Sums are in float32 (float64 for double).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(
    x: Tensor,  # hidden states, (R, C)
    weight: Tensor,  # (V, C)
    bias: Tensor | None,  # (V,)
    target: Tensor,  # (R,) int64
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    product: torch.dtype,  # of the factors of matrix products, which the reference does not round
    need_x: bool,  # whose gradients are made
    need_weight: bool,
    need_bias: bool,
) -> Outputs:
    """loss (), correct () int64, nll (), and the loss's gradients by x (R, C), weight (V, C) and bias (V,).

    With e = label_smoothing, z = z_loss, and n the number of targets in [0, V) other than ignore_index, at least 1:

        logits = x W^T + b,    s = logsumexp(logits),    log p = logits - s
        nll  = sum_r -log p_ry
        loss = sum_r [(1 - e) (-log p_ry) + e / V sum_v (-log p_rv) + z s_r^2] / n
        dlogits_rv = [(1 + 2 z s_r) p_rv - (1 - e) [v = y_r] - e / V] / n,    0 in the rows that do not count

    Loss and nll are float32 (float64 for a double x). A gradient nobody needs has no elements.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide_x, wide_weight = x.to(wide), weight.to(wide)
    logits = F.linear(wide_x, wide_weight, None if bias is None else bias.to(wide))
    classes = weight.shape[0]
    counts = (target >= 0) & (target < classes) & (target != ignore_index)
    label = torch.where(counts, target, 0)[:, None]
    divisor = counts.sum().clamp(min=1)

    total = logits.logsumexp(1)
    log_p = logits - total[:, None]
    nll = -log_p.gather(1, label)[:, 0]
    row = (1 - label_smoothing) * nll - label_smoothing * log_p.mean(1) + z_loss * total.square()
    loss = torch.where(counts, row, 0).sum() / divisor
    correct = (counts & (logits.argmax(1) == label[:, 0])).sum()

    dlogits = (1 + 2 * z_loss * total)[:, None] * log_p.exp() - label_smoothing / classes
    dlogits.scatter_add_(1, label, dlogits.new_full((1, 1), label_smoothing - 1).expand_as(label))
    dlogits = torch.where(counts[:, None], dlogits / divisor, 0)
    return (
        loss,
        correct,
        torch.where(counts, nll, 0).sum(),
        (dlogits @ wide_weight).to(kept(x.dtype)) if need_x else logits.new_empty(0, dtype=kept(x.dtype)),
        (dlogits.t() @ wide_x).to(kept(weight.dtype)) if need_weight else logits.new_empty(0, dtype=kept(weight.dtype)),
        dlogits.sum(0) if need_bias else logits.new_empty(0),
    )


def kept(dtype: torch.dtype) -> torch.dtype:
    """In what a gradient of ``dtype`` is kept from the forward to the backward pass."""
    return torch.float32 if dtype == torch.float16 else dtype

"""Global average pool, linear layer and cross-entropy in plain PyTorch, the gradient made in the forward pass.

What every provider does: backward only scales the gradients. They stay in float32 (float64 for double) until then and
are rounded to the inputs' dtypes afterwards, so float16 does not underflow. Sums take the place of means: 1 / P goes
into the logits and into their gradient, so one scaled gradient of the logits serves x, weight and bias. The gradient
of x has (N, C) elements and is expanded over the positions. Matrix products are ``aten::matmul``, so TF32 follows the
user's setting and large class counts get a tuned GEMM.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(
    x: Tensor,  # feature map, (N, C) or (N, C, *positions)
    weight: Tensor,  # (K, C)
    bias: Tensor | None,  # (K,)
    target: Tensor,  # labels, (N,) int64
    ignore_index: int,
    label_smoothing: float,
    mean: bool,  # divide the loss by the number of labels that count
    need_x: bool,  # whose gradients are made
    need_weight: bool,
    need_bias: bool,
) -> Outputs:
    """loss (), logits (N, K), correct () int64, and d loss / d pooled feature / P (N, C), d weight (K, C), d bias (K,).

    With P positions, e = label_smoothing, and V the number of labels in [0, K) other than ignore_index (1 for a sum):

        logits = mean_p(x) W^T + b,    p = softmax(logits)
        loss   = sum_n [(1 - e) (-log p_ny) + e / K sum_k (-log p_nk)] / V
        dlogits_nk = (p_nk - (1 - e) [k = y_n] - e / K) / V,    0 in the rows that do not count

    Everything is computed and returned in float32 (float64 for a double x). A gradient nobody needs has no elements.
    """
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    classes, positions = weight.shape[0], x.shape[2:].numel()
    pooled = x.mean(dim=tuple(range(2, x.dim())), dtype=accumulate) if x.dim() > 2 else x.to(accumulate)
    wide_weight = weight.to(accumulate)
    logits = F.linear(pooled, wide_weight, None if bias is None else bias.to(accumulate))

    counts = (target >= 0) & (target < classes) & (target != ignore_index)
    label = torch.where(counts, target, 0).unsqueeze(1)
    log_p = F.log_softmax(logits, dim=1)
    row = -log_p.gather(1, label).squeeze(1)
    if label_smoothing:
        row = (1 - label_smoothing) * row - label_smoothing * log_p.mean(1)
    divisor = counts.sum() if mean else 1
    loss = torch.where(counts, row, 0).sum() / divisor
    correct = (counts & (logits.argmax(1) == label.squeeze(1))).sum()

    nothing = logits.new_empty(0)
    if not (need_x or need_weight or need_bias):
        return loss, logits, correct, nothing, nothing.clone(), nothing.clone()
    dlogits = log_p.exp_()
    dlogits.scatter_add_(1, label, dlogits.new_full((1, 1), -1).expand_as(label))
    if label_smoothing:
        dlogits.sub_(label_smoothing / classes)
        dlogits.scatter_add_(1, label, dlogits.new_full((1, 1), label_smoothing).expand_as(label))
    dlogits = torch.where(counts.unsqueeze(1), dlogits / divisor, 0)
    return (
        loss,
        logits,
        correct,
        (dlogits @ wide_weight).div_(positions) if need_x else nothing,
        dlogits.t() @ pooled if need_weight else nothing.clone(),
        dlogits.sum(0) if need_bias else nothing.clone(),
    )

"""Global average pool, linear classifier and cross-entropy by torch's own kernels, those of ``F.cross_entropy`` too."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._torch import log_softmax_backward
from ..labels import ignoring_bad_labels
from ..reference.pooled_cross_entropy import Outputs

_MEAN, _SUM = 1, 2  # the numbers of aten's reductions


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
    """As ``reference/pooled_cross_entropy.py`` has it."""
    accumulate = torch.float64 if x.dtype == torch.float64 else torch.float32
    classes, positions = weight.shape[0], x.shape[2:].numel()
    pooled = x.mean(dim=tuple(range(2, x.dim())), dtype=accumulate) if x.dim() > 2 else x.to(accumulate)
    wide_weight = weight.to(accumulate)
    logits = F.linear(pooled, wide_weight, None if bias is None else bias.to(accumulate))

    label = ignoring_bad_labels(target, classes, ignore_index)
    log_p = F.log_softmax(logits, dim=1)
    reduction = _MEAN if mean else _SUM
    loss, count = torch.ops.aten.nll_loss_forward(log_p, label, None, reduction, ignore_index)
    ignored = label == ignore_index
    correct = ((logits.argmax(1) == label) & ~ignored).sum()
    if label_smoothing:
        smooth = log_p.masked_fill(ignored.unsqueeze(1), 0).sum().div_(-classes)
        loss = loss.mul_(1 - label_smoothing).add_(smooth.div_(count) if mean else smooth, alpha=label_smoothing)

    nothing = logits.new_empty(0)
    if not (need_x or need_weight or need_bias):
        return loss, logits, correct, nothing, nothing.clone(), nothing.clone()
    one = loss.new_full((), 1 - label_smoothing)
    dlog_p = torch.ops.aten.nll_loss_backward(one, log_p, label, None, reduction, ignore_index, count)
    if label_smoothing:
        share = loss.new_full((), -label_smoothing / classes)
        dlog_p.add_(share.div_(count) if mean else share)
    # Their rows may hold NaN: of such logits, or divided by a count of 0.
    dlogits = log_softmax_backward(dlog_p, log_p, 1, accumulate).masked_fill_(ignored.unsqueeze(1), 0)
    return (
        loss,
        logits,
        correct,
        (dlogits @ wide_weight).div_(positions) if need_x else nothing,
        dlogits.t() @ pooled if need_weight else nothing.clone(),
        dlogits.sum(0) if need_bias else nothing.clone(),
    )

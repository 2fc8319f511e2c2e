"""Binary cross-entropy of a reconstruction by torch's own kernels; see ``reference/reconstruction_loss.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import empty_like


def forward(logits: Tensor, image: Tensor, mean: Tensor, std: Tensor, need_grad: bool) -> tuple[Tensor, Tensor]:
    """loss () and sigmoid(logits) - target, or no elements."""
    accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    wide = logits.to(accumulate)
    mean, std = (values.to(accumulate).view(1, -1, 1, 1) for values in (mean, std))
    target = torch.addcmul(mean, image.to(accumulate), std).clamp_(0, 1)
    loss = F.binary_cross_entropy_with_logits(wide, target)
    if not need_grad:
        return loss, logits.new_empty(0)
    grad = empty_like(logits, dtype=accumulate)
    torch.sub(torch.sigmoid(wide, out=grad), target, out=grad)
    return loss, grad.to(logits.dtype)

"""Binary cross-entropy of a reconstruction against the image in plain PyTorch, the gradient made with it.

What every provider does:

- **sigmoid(logits) - pixel is stored, in the logits' dtype.** It lies in [-1, 1], so 16 bits lose digits but no
  range. Backward divides it in float32 by the number of elements (three million at batch 1024) and multiplies it by
  the loss scale, both at once; either factor alone would underflow in float16. The logits and the restored image are
  not stored.
- **Elements are visited in the order of the gradient's memory**, dense logits and images in vectors; an image in
  another layout is gathered.
- **exp and log1p are written out for float32**, as polynomials without branches, because a loop that calls the C
  library cannot be vectorised on the CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import empty_like


def forward(
    logits: Tensor,  # (N, C, H, W)
    image: Tensor,  # the network's input, (N, C, H, W), of any floating dtype
    mean: Tensor,  # (C,)
    std: Tensor,  # (C,)
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    """loss () and the gradient of the sum of all losses, (N, C, H, W).

    With s = sigmoid(logits) and t = clamp(image std + mean, 0, 1):

        loss = mean over all elements of -t log(s) - (1 - t) log(1 - s)
        gradient = s - t

    Everything is computed in float32 (float64 for double logits), which is the loss's dtype; the gradient has the dtype
    of the logits and their layout, and no elements where nobody needs it. It is not divided by the number of
    elements: so it lies in [-1, 1], where float16 holds it.
    """
    accumulate = torch.float64 if logits.dtype == torch.float64 else torch.float32
    wide = logits.to(accumulate)
    mean, std = (values.to(accumulate).view(1, -1, 1, 1) for values in (mean, std))
    target = (image.to(accumulate) * std + mean).clamp_(0, 1)
    loss = F.binary_cross_entropy_with_logits(wide, target)
    if not need_grad:
        return loss, logits.new_empty(0)
    return loss, empty_like(logits).copy_(wide.sigmoid().sub_(target))

"""How the results of an op lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Memory for a map of x's shape, in its dtype unless another is given: channels-last where the channels of x lie
    together, else contiguous.

    ``csrc/feature_map.h`` has the same rule, so that the fake kernels' strides are those of every provider.
    """
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return torch.empty_like(x, dtype=dtype)
    if x.dim() > 2 and x.stride(1) == 1:
        return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1]), dtype=dtype).movedim(-1, 1)
    return x.new_empty(x.shape, dtype=dtype)

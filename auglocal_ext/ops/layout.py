"""How the results of an op lie in memory."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_like(x: Tensor) -> Tensor:
    """Memory for a map of x's shape and dtype: channels-last where the channels of x lie together, else contiguous.

    ``csrc/feature_map.h`` has the same rule, so that the fake kernels' strides are those of every provider.
    """
    if x.is_contiguous() or x.movedim(1, -1).is_contiguous():
        return torch.empty_like(x)
    if x.dim() > 2 and x.stride(1) == 1:
        return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1])).movedim(-1, 1)
    return x.new_empty(x.shape)

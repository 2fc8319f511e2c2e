"""Whether parameters are spread over processes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether any of the parameters is a DTensor, as ``fully_shard`` makes them; costs nothing without a process group."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in parameters)

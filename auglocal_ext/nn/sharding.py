"""Whether a module's parameters are spread over processes."""

from __future__ import annotations

import torch
from torch import nn


def in_process_group() -> bool:
    """Whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` holds parameters of a module; costs nothing without a process group."""
    if not in_process_group():
        return False
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    # While a module runs that fully_shard has wrapped, its parameters are whole; before and after they are DTensors.
    return isinstance(module, FSDPModule) or any(isinstance(parameter, DTensor) for parameter in module.parameters())

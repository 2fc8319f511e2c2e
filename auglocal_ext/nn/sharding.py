"""Whether a module's parameters are spread over processes."""

from __future__ import annotations

import torch
from torch import nn


def in_process_group() -> bool:
    """Whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` or FullyShardedDataParallel holds parameters of a module, or of a part of it.

    Costs nothing without a process group.
    """
    if not in_process_group():
        return False
    from torch.distributed.tensor import DTensor

    # Parameters are whole while their module runs, and stay so until its backward: both wrappers mark what they hold.
    marked = any(getattr(part, "_is_fsdp_managed_module", False) for part in module.modules())
    return marked or any(isinstance(parameter, DTensor) for parameter in module.parameters())


def refuse_sharding(module: nn.Module) -> None:
    """RuntimeError for a module of which :func:`sharded` says so."""
    if sharded(module):
        raise RuntimeError(
            "parameters of this network are sharded: the training pass would miss them. Leave fully_shard and "
            "FullyShardedDataParallel out; DistributedDataParallel around the whole network works"
        )

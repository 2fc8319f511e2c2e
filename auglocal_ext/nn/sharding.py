"""Whether a module's parameters are spread over processes."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import nn

from .._torch import is_fsdp_managed


def in_process_group() -> bool:
    """Whether this process is one of a group."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_sharded(value: Any) -> bool:
    """Whether a value is a ``DTensor``, of which a process holds a part."""
    if not in_process_group():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)


def own_part(tensor: Any) -> torch.Tensor:
    """What this process has of a tensor, detached: its shard where it is sharded, else all of it."""
    detached = tensor.detach()
    return cast("torch.Tensor", detached.to_local() if is_sharded(tensor) else detached)


def shard_like(value: Any, held: Any) -> Any:
    """This process's shard of ``value`` where it is a whole tensor and ``held`` is sharded; else ``value`` itself."""
    if not is_sharded(held) or is_sharded(value) or not isinstance(value, torch.Tensor) or value.shape != held.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    whole = value.detach().to(held.device)
    return cast("Any", distribute_tensor)(whole, held.device_mesh, held.placements, src_data_rank=None)


def own_type(module: nn.Module | None) -> type:
    """The class of a module before ``fully_shard``, which gives it one that is derived from it and ``FSDPModule``."""
    kind: type = type(module)
    fsdp = sys.modules.get("torch.distributed.fsdp")  # imported by whoever shards, and slow to import
    if fsdp is None or not issubclass(kind, fsdp.FSDPModule):
        return kind
    return kind.__mro__[kind.__mro__.index(fsdp.FSDPModule) + 1]


def sharded(module: nn.Module) -> bool:
    """Whether ``fully_shard`` or FullyShardedDataParallel holds parameters of a module, or of a part of it.

    Costs nothing without a process group.
    """
    if not in_process_group():
        return False
    # Parameters are whole while their module runs, and stay so until its backward: both wrappers mark what they hold.
    marked = any(map(is_fsdp_managed, module.modules()))
    return marked or any(map(is_sharded, module.parameters()))


def refuse_sharding(module: nn.Module) -> None:
    """RuntimeError for a module of which :func:`sharded` says so."""
    if sharded(module):
        raise RuntimeError(
            "parameters of this network are sharded: the training pass would miss them. Leave fully_shard and "
            "FullyShardedDataParallel out; LocalStep(net, optimizer, mesh=mesh, shard=True) shards them itself"
        )

"""Which processes do what: the mesh that ``LocalStep`` is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .._torch import group_timeout

#: A ``torch.distributed.device_mesh.DeviceMesh``, which torch may have been built without.
Mesh = Any

STAGE, REPLICA = "stage", "replica"


def mesh_groups(mesh: Mesh) -> tuple[Any | None, Any | None]:
    """Process groups of this process's stages and of its replicas; None where there is one of them.

    Args:
        mesh: its dimensions are named: ``"stage"``, ``"replica"``, or both in this order.

    Raises:
        TypeError: for what is no mesh.
        ValueError: for other dimensions, or a process that is not part of it.
    """
    if not torch.distributed.is_available():
        raise ValueError("this torch was built without torch.distributed: leave mesh= out")
    from torch.distributed.device_mesh import DeviceMesh

    if not isinstance(mesh, DeviceMesh):
        raise TypeError(
            'mesh must be a DeviceMesh, such as init_device_mesh("cuda", (2,), mesh_dim_names=("replica",)); '
            f"got {type(mesh).__name__}"
        )
    names = mesh.mesh_dim_names
    if names is None or names not in ((STAGE,), (REPLICA,), (STAGE, REPLICA)):
        raise ValueError(
            'the dimensions of mesh must be named ("stage",), ("replica",) or ("stage", "replica"), in this order; '
            f"got {'no names' if names is None else names}: pass mesh_dim_names= to init_device_mesh"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"rank {torch.distributed.get_rank()} is not part of mesh: leave it out of the step")
    sizes = dict(zip(names, mesh.shape, strict=True))
    stages, replicas = (mesh.get_group(name) if sizes.get(name, 1) > 1 else None for name in (STAGE, REPLICA))
    return stages, replicas


def group_like(group: Any, ranks: Sequence[int] | None = None, *, on_hosts: bool = False) -> Any:
    """Another process group with the same time-out; collective.

    All its processes must have created as many groups before, by which torch names it.

    Args:
        group: the group.
        ranks: its processes; None for those of ``group``.
        on_hosts: for tensors on the CPU, by gloo where this torch has it.
    """
    ranks = torch.distributed.get_process_group_ranks(group) if ranks is None else list(ranks)
    backend = "gloo" if on_hosts and torch.distributed.is_gloo_available() else None
    return torch.distributed.new_group(
        ranks, timeout=group_timeout(group), backend=backend, use_local_synchronization=True
    )

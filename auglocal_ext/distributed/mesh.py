"""Which processes do what: the mesh that ``LocalStep`` is given."""

from __future__ import annotations

from typing import Any

import torch

#: A ``torch.distributed.device_mesh.DeviceMesh``, which torch may have been built without.
Mesh = Any

STAGE, REPLICA = "stage", "replica"


def replica_group(mesh: Mesh) -> Any | None:
    """Process group of the replicas of a mesh; None where it has one replica.

    Args:
        mesh: its dimensions are named: ``"replica"``, or ``"stage"`` and ``"replica"``.

    Raises:
        TypeError: for what is no mesh.
        ValueError: for other dimensions, a process that is not part of it, or more than one stage.
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
    if names is None or names not in ((REPLICA,), (STAGE, REPLICA)):
        raise ValueError(
            'the dimensions of mesh must be named ("replica",) or ("stage", "replica"), in this order; '
            f"got {'no names' if names is None else names}: pass mesh_dim_names= to init_device_mesh"
        )
    if mesh.get_coordinate() is None:
        raise ValueError(f"rank {torch.distributed.get_rank()} is not part of mesh: leave it out of the step")
    sizes = dict(zip(names, mesh.shape, strict=True))
    if sizes.get(STAGE, 1) != 1:
        raise ValueError(
            f"mesh has {sizes[STAGE]} stages, and every process runs all local modules so far: give it one stage"
        )
    return None if sizes[REPLICA] == 1 else mesh.get_group(REPLICA)

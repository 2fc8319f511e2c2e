"""Several processes that train one network, on torch.distributed."""

from .agreement import DisagreementError, agree
from .mesh import Mesh, mesh_groups
from .replicas import Average, Replicas
from .stages import Stage, balanced_cuts

__all__ = ["Average", "DisagreementError", "Mesh", "Replicas", "Stage", "agree", "balanced_cuts", "mesh_groups"]

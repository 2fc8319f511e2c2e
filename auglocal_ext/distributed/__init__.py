"""Several processes that train one network, on torch.distributed."""

from .agreement import DisagreementError, agree
from .mesh import Mesh, replica_group
from .replicas import Average, Replicas

__all__ = ["Average", "DisagreementError", "Mesh", "Replicas", "agree", "replica_group"]

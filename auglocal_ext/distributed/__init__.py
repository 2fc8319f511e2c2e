"""Several processes that train one network, on torch.distributed."""

from .agreement import DisagreementError, agree, everyone, shapes_of
from .checkpoint_folder import CheckpointError, Stored, together, write
from .link import Form
from .mesh import Mesh, group_like, mesh_groups
from .parameter_edge import ParameterEdge
from .replicas import Average, Replicas
from .shards import Shards
from .stages import Stage, balanced_cuts, checked_cuts, crossing_inputs, cut_numbers
from .times import Span, StepTimes

__all__ = [
    "Average",
    "CheckpointError",
    "DisagreementError",
    "Form",
    "Mesh",
    "ParameterEdge",
    "Replicas",
    "Shards",
    "Span",
    "Stage",
    "StepTimes",
    "Stored",
    "agree",
    "balanced_cuts",
    "checked_cuts",
    "crossing_inputs",
    "cut_numbers",
    "everyone",
    "group_like",
    "mesh_groups",
    "shapes_of",
    "together",
    "write",
]

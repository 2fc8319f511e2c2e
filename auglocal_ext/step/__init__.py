"""A whole training step: per-module optimizers, one CUDA graph, two streams, memory planned ahead."""

from .graph import GraphCaptureError
from .local_step import LocalStep
from .memory_plan import MemoryPlan
from .optimizers import OptimizerFactory
from .pipeline import DelayedOutput
from .plan import MemoryBudgetError, plan_memory
from .stage_plan import StageCost, StagePlan, plan_stages

__all__ = [
    "DelayedOutput",
    "GraphCaptureError",
    "LocalStep",
    "MemoryBudgetError",
    "MemoryPlan",
    "OptimizerFactory",
    "StageCost",
    "StagePlan",
    "plan_memory",
    "plan_stages",
]

"""A whole training step: per-module optimizers, one CUDA graph, two streams, memory planned ahead."""

from .graph import GraphCaptureError
from .local_step import LocalStep
from .memory_plan import MemoryPlan
from .optimizers import OptimizerFactory
from .plan import MemoryBudgetError, plan_memory

__all__ = [
    "GraphCaptureError",
    "LocalStep",
    "MemoryBudgetError",
    "MemoryPlan",
    "OptimizerFactory",
    "plan_memory",
]

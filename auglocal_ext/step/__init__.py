"""A whole training step: per-module optimizers, one CUDA graph, two streams, several processes."""

from .graph import GraphCaptureError
from .local_step import LocalStep
from .memory_plan import MemoryPlan
from .optimizers import OptimizerFactory
from .pipeline import DelayedOutput

__all__ = [
    "DelayedOutput",
    "GraphCaptureError",
    "LocalStep",
    "MemoryPlan",
    "OptimizerFactory",
]

"""A whole training step: per-module optimizers, one CUDA graph, two streams."""

from .graph import GraphCaptureError
from .local_step import LocalStep, StepOutput
from .optimizers import OptimizerFactory

__all__ = ["GraphCaptureError", "LocalStep", "OptimizerFactory", "StepOutput"]

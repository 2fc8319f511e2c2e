"""Plans before training: what a step will hold and compute, and what it should recompute, found on fake tensors."""

from .memory import MemoryBudgetError, plan_memory
from .stages import StageCost, StagePlan, plan_stages

__all__ = [
    "MemoryBudgetError",
    "StageCost",
    "StagePlan",
    "plan_memory",
    "plan_stages",
]

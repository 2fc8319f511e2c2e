"""How a training pass over local modules runs."""

from .eager import LocalOutput, local_pass
from .local_module import RECOMPUTE, LocalModule, LossOptions, Recompute, run_forward

__all__ = ["RECOMPUTE", "LocalModule", "LocalOutput", "LossOptions", "Recompute", "local_pass", "run_forward"]

"""How a training pass over local modules runs."""

from .eager import LocalOutput, local_pass
from .local_module import LocalModule, LossOptions, run_forward

__all__ = ["LocalModule", "LocalOutput", "LossOptions", "local_pass", "run_forward"]

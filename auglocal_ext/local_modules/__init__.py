"""A local module, and the training pass over local modules."""

from .local_module import (
    RECOMPUTE,
    LocalModule,
    PassModule,
    Recompute,
    Relay,
    recomputes_auxiliary,
    run_forward,
)
from .local_pass import LocalOutput, OneStream, Take, local_pass

__all__ = [
    "RECOMPUTE",
    "LocalModule",
    "LocalOutput",
    "OneStream",
    "PassModule",
    "Recompute",
    "Relay",
    "Take",
    "local_pass",
    "recomputes_auxiliary",
    "run_forward",
]

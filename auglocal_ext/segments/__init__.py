"""A model's own forward run in parts: where it can be cut, and what runs between two cuts."""

from .boundaries import Boundary, Passage, Skips, find_boundaries
from .carried import Carrying, carried, carry, detached
from .ghost import CrossingError, Ghost
from .readout import BeforeReadout, readout_of
from .recording import picked_output
from .run import runs_segment
from .segment import Segment

__all__ = [
    "BeforeReadout",
    "Boundary",
    "Carrying",
    "CrossingError",
    "Ghost",
    "Passage",
    "Segment",
    "Skips",
    "carried",
    "carry",
    "detached",
    "find_boundaries",
    "picked_output",
    "readout_of",
    "runs_segment",
]

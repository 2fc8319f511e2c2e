"""A model's own forward run in parts: where it can be cut, and what runs between two cuts."""

from .boundaries import Boundary, Passage, find_boundaries
from .ghost import CrossingError, Ghost
from .recording import picked_output
from .segment import Segment

__all__ = [
    "Boundary",
    "CrossingError",
    "Ghost",
    "Passage",
    "Segment",
    "find_boundaries",
    "picked_output",
]

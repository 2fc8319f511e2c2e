"""What is learned: one file per task."""

from .base import Scored, Task
from .binary import Binary, MultiLabel
from .classification import Classification
from .contrast import SupervisedContrast
from .criterion import Criterion
from .language_modelling import LanguageModelling
from .regression import Regression
from .segmentation import Segmentation

__all__ = [
    "Binary",
    "Classification",
    "Criterion",
    "LanguageModelling",
    "MultiLabel",
    "Regression",
    "Scored",
    "Segmentation",
    "SupervisedContrast",
    "Task",
]

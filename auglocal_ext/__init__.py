"""Supervised local learning for PyTorch: AugLocal, ContSup and lean local modules.

>>> from auglocal_ext import LocalSequential, AugLocal
>>> net = LocalSequential(layers, rule=AugLocal(depth=6), num_classes=10, input_shape=(3, 32, 32))
>>> out = net(x, y)
>>> out.loss.backward()
"""

from ._version import __version__
from .local_modules import LocalModule, LocalOutput
from .local_sequential import InferenceNetwork, LocalSequential, localize
from .nn import FusionReport, fuse, unfuse
from .partition import Balanced
from .rules import DGL, MAN, SOLO, AugLocal, ContSup, ConvHead, Greedy, InfoPro, PredSim, Rule
from .step import LocalStep
from .tasks import Binary, Classification, Criterion, LanguageModelling, MultiLabel, Regression, Segmentation, Task

__all__ = [
    "DGL",
    "MAN",
    "SOLO",
    "AugLocal",
    "Balanced",
    "Binary",
    "Classification",
    "ContSup",
    "ConvHead",
    "Criterion",
    "FusionReport",
    "Greedy",
    "InferenceNetwork",
    "InfoPro",
    "LanguageModelling",
    "LocalModule",
    "LocalOutput",
    "LocalSequential",
    "LocalStep",
    "MultiLabel",
    "PredSim",
    "Regression",
    "Rule",
    "Segmentation",
    "Task",
    "__version__",
    "fuse",
    "localize",
    "unfuse",
]

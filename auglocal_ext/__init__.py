"""Supervised local learning for PyTorch: AugLocal, ContSup and lean local modules.

>>> from auglocal_ext import LocalSequential, AugLocal
>>> net = LocalSequential(layers, rule=AugLocal(depth=6), num_classes=10, input_shape=(3, 32, 32))
>>> out = net(x, y)
>>> out.loss.backward()
"""

from ._version import __version__
from .local_modules import LocalModule, LocalOutput
from .local_sequential import InferenceNetwork, LocalSequential
from .nn import FusionReport, fuse, unfuse
from .partition import Balanced
from .rules import DGL, MAN, AugLocal, ContSup, Greedy, InfoPro, PredSim, Rule
from .step import LocalStep

__all__ = [
    "DGL",
    "MAN",
    "AugLocal",
    "Balanced",
    "ContSup",
    "FusionReport",
    "Greedy",
    "InferenceNetwork",
    "InfoPro",
    "LocalModule",
    "LocalOutput",
    "LocalSequential",
    "LocalStep",
    "PredSim",
    "Rule",
    "__version__",
    "fuse",
    "unfuse",
]

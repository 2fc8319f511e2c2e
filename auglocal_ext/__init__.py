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
from .rules import AugLocal, ContSup, Rule
from .step import LocalStep

__all__ = [
    "AugLocal",
    "Balanced",
    "ContSup",
    "FusionReport",
    "InferenceNetwork",
    "LocalModule",
    "LocalOutput",
    "LocalSequential",
    "LocalStep",
    "Rule",
    "__version__",
    "fuse",
    "unfuse",
]

"""What a trained network's layers represent: similarity to another network, separability, information, learning."""

from ..training.run.curves import Curves, read_curves
from .cka import CKA, cka
from .curves import ModuleScore, module_scores
from .features import layer_names, layer_outputs
from .information import Information, LayerInformation, information
from .probes import LayerProbe, linear_probes
from .readout import Loaders, Source

__all__ = [
    "CKA",
    "Curves",
    "Information",
    "LayerInformation",
    "LayerProbe",
    "Loaders",
    "ModuleScore",
    "Source",
    "cka",
    "information",
    "layer_names",
    "layer_outputs",
    "linear_probes",
    "module_scores",
    "read_curves",
]

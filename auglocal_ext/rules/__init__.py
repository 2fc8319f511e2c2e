"""Local learning rules, one file each, and the heads that end their auxiliary networks."""

from .auglocal import SAMPLING, AugLocal
from .base import HEADS, Head, Network, Rule, resolved
from .contsup import ContSup
from .dgl_head import DGL_HEADS, DGLHead
from .fcn_head import FCNHead
from .greedy import DGL, Greedy
from .heads import CONV_HEADS, ConvHead, LinearHead, PredictionHead, VGGHead
from .infopro import INFOPRO_WEIGHTS, InfoPro
from .man import MAN
from .options import Option, head_option, option
from .predsim import PredSim
from .solo import SOLO

#: The rules that the command line and recipes know, by name.
RULES: dict[str, type[Rule]] = {
    rule.name: rule for rule in (AugLocal, ContSup, DGL, Greedy, InfoPro, MAN, PredSim, SOLO)
}

__all__ = [
    "CONV_HEADS",
    "DGL",
    "DGL_HEADS",
    "HEADS",
    "INFOPRO_WEIGHTS",
    "MAN",
    "RULES",
    "SAMPLING",
    "SOLO",
    "AugLocal",
    "ContSup",
    "ConvHead",
    "DGLHead",
    "FCNHead",
    "Greedy",
    "Head",
    "InfoPro",
    "LinearHead",
    "Network",
    "Option",
    "PredSim",
    "PredictionHead",
    "Rule",
    "VGGHead",
    "head_option",
    "option",
    "resolved",
]

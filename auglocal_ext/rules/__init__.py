"""Local learning rules, one file each."""

from .auglocal import SAMPLING, AugLocal
from .base import HeadOrRule, Network, Rule, build_task, check_head, head_ends
from .contsup import ContSup
from .greedy import DGL, Greedy
from .infopro import INFOPRO_WEIGHTS, InfoPro
from .man import MAN
from .predsim import PredSim

__all__ = [
    "DGL",
    "INFOPRO_WEIGHTS",
    "MAN",
    "SAMPLING",
    "AugLocal",
    "ContSup",
    "Greedy",
    "HeadOrRule",
    "InfoPro",
    "Network",
    "PredSim",
    "Rule",
    "build_task",
    "check_head",
    "head_ends",
]

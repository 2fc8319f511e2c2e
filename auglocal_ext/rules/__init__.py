"""Local learning rules, one file each."""

from .auglocal import AugLocal
from .base import Network, Rule
from .contsup import ContSup

__all__ = ["AugLocal", "ContSup", "Network", "Rule"]

"""Greedy local learning, and its decoupled form with stronger classifiers (DGL)."""

from __future__ import annotations

from dataclasses import dataclass

from ..auxiliary.base import Auxiliary
from .base import Head, Network, Rule, resolved
from .options import head_option


@dataclass(frozen=True)
class Greedy(Rule):
    """Each local module is trained through a linear classifier on its pooled output: ``CE(W mean_p(h) + b, y)``.

    Args:
        head: the classifier on a module's output: the name of a head, or a rule.

    Source: the baseline "greedy SL" of Wang et al., ICLR 2021.
    """

    name = "greedy"

    head: Head = head_option("linear")

    def __post_init__(self) -> None:
        resolved(self.head)

    def build_auxiliary(self, network: Network, module: int) -> Auxiliary:
        return resolved(self.head).build_auxiliary(network, module)


@dataclass(frozen=True)
class DGL(Greedy):
    """Each local module is trained through a classifier of its own: ``CE(head(h), y)``; all modules on the same batch.

    Args:
        head: ``"mlp-sr"`` (pooled to a quarter, 1x1 convolutions, hidden linear layers), ``"mlp"`` or ``"cnn"``, see
            :class:`auglocal_ext.rules.DGLHead`; or any other head.

    Raises:
        ValueError: for an unknown head; when wrapped, for a module whose output the head cannot take.

    Source: Belilovsky, Eickenberg and Oyallon, Decoupled Greedy Learning of CNNs, ICML 2020, algorithm 1 (all modules
    are updated on the same batch).
    """

    name = "dgl"

    head: Head = head_option("mlp-sr")

"""Greedy local learning, and its decoupled form with stronger classifiers (DGL)."""

from __future__ import annotations

from dataclasses import dataclass

from ..auxiliary.base import Auxiliary
from .base import Head, Network, Rule, resolved
from .dgl_head import DGL_HEADS, DGLHead
from .options import head_option, option


@dataclass(frozen=True)
class Greedy(Rule):
    """Each local module is trained through a linear classifier on its pooled output: ``CE(W mean_p(h) + b, y)``.

    Args:
        head: the classifier on a module's output: the name of a head, or a rule.

    Source: the baseline "greedy SL" of Wang et al., ICLR 2021.
    """

    name = "greedy"

    head: Head = head_option("linear")

    def build_auxiliary(self, network: Network, module: int) -> Auxiliary:
        head = self.head_rule
        assert head is not None
        return head.build_auxiliary(network, module)


@dataclass(frozen=True)
class DGL(Greedy):
    """Each local module is trained through a classifier of its own: ``CE(head(h), y)``; all modules on the same batch.

    Args:
        head: ``"mlp-sr"`` (pooled to a quarter, 1x1 convolutions, hidden linear layers), ``"mlp"``, ``"cnn"`` or
            ``"mlp-sr-auglocal"``, see :class:`auglocal_ext.rules.DGLHead`; or any other head.
        init: as :class:`auglocal_ext.rules.DGLHead` has it; other heads have no such option.

    Raises:
        ValueError: for an unknown head or ``init``, and for ``init`` with a head that is none of DGL's by name; when
            wrapped, for a module whose output the head cannot take.

    Source: Belilovsky, Eickenberg and Oyallon, Decoupled Greedy Learning of CNNs, ICML 2020, algorithm 1 (all modules
    are updated on the same batch).
    """

    name = "dgl"

    head: Head = head_option("mlp-sr")
    init: str = option("own", "initial values of the auxiliary networks", choices=("own", "released"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init != "own" and self.head not in DGL_HEADS:
            raise ValueError(
                f"init={self.init!r} is for DGL's heads by name ({', '.join(DGL_HEADS)}); head={self.head!r} has "
                "options of its own, such as DGLHead('cnn', init='released')"
            )

    @property
    def head_rule(self) -> Rule:
        if isinstance(self.head, str) and self.head in DGL_HEADS:
            return DGLHead(self.head, self.init)
        return resolved(self.head)

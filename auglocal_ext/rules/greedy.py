"""Greedy local learning, and its decoupled form with stronger classifiers (DGL)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..auxiliary.heads import DGL_HEADS, AuxiliaryNetwork, DGLHead, LinearHead
from .base import Network, Rule


@dataclass(frozen=True)
class Greedy(Rule):
    """Each local module is trained through a linear classifier on its pooled output: ``CE(W mean_p(h) + b, y)``.

    Source: the baseline "greedy SL" of Wang et al., ICLR 2021.
    """

    def build_auxiliary(self, network: Network, module: int) -> AuxiliaryNetwork:
        head = LinearHead(network.last_layer(module).shape[0], network.num_classes)
        return AuxiliaryNetwork(nn.Sequential(), head)


@dataclass(frozen=True)
class DGL(Rule):
    """Each local module is trained through a classifier of its own: ``CE(head(h), y)``; all modules on the same batch.

    Args:
        head: ``"mlp-sr"`` (pooled to a quarter, 1x1 convolutions, hidden linear layers), ``"mlp"`` or ``"cnn"``:
            :class:`auglocal_ext.auxiliary.DGLHead`.

    Raises:
        ValueError: for an unknown head; when wrapped, for a module that puts out vectors.

    Source: Belilovsky, Eickenberg and Oyallon, Decoupled Greedy Learning of CNNs, ICML 2020, algorithm 1 (all modules
    are updated on the same batch).
    """

    head: str = "mlp-sr"

    def __post_init__(self) -> None:
        if self.head not in DGL_HEADS:
            raise ValueError(f"unknown auxiliary head {self.head!r}; choose one of {', '.join(DGL_HEADS)}")

    def build_auxiliary(self, network: Network, module: int) -> AuxiliaryNetwork:
        shape = network.last_layer(module).shape
        if len(shape) != 3:
            raise ValueError(
                f"DGL's heads pool feature maps (C, H, W), but local module {module} puts out {shape}; "
                "use Greedy() for networks on vectors"
            )
        head = DGLHead(self.head, shape[0], (shape[1], shape[2]), network.num_classes)
        return AuxiliaryNetwork(nn.Sequential(), head)

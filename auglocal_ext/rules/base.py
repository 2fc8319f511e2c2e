"""What a learning rule decides: where the network is cut, who looks at a module's output, what else it is fed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..auxiliary.context import ContextSupply
from ..partition import Layer, cut_points


@dataclass(frozen=True)
class Network:
    """The primary network as a rule sees it.

    Attributes:
        primary: the user's ``nn.Sequential``.
        layers: its layers (:class:`auglocal_ext.partition.Layer`).
        input_shape: shape of one input, ``(C, H, W)`` or ``(features,)``.
        num_classes: number of classes.
        ends: index of the last layer of each local module, ascending.
    """

    primary: nn.Sequential
    layers: tuple[Layer, ...]
    input_shape: tuple[int, ...]
    num_classes: int
    ends: tuple[int, ...]

    @property
    def num_modules(self) -> int:
        return len(self.ends)

    def last_layer(self, module: int) -> Layer:
        """The layer with which local module ``module`` ends."""
        return self.layers[self.ends[module]]

    def children_of(self, layer: Layer) -> list[nn.Module]:
        """The children of ``primary`` that form ``layer``."""
        return list(self.primary)[layer.start : layer.stop]


class Rule(ABC):
    """A local learning rule: builds the auxiliary network and the context of each local module.

    A subclass composes parts of :mod:`auglocal_ext.auxiliary`; the training pass itself is the same for all.
    """

    def ends(self, num_layers: int, modules: int | Sequence[int] | None) -> tuple[int, ...]:
        """Index of the last layer of each local module for the user's ``modules`` argument."""
        return cut_points(num_layers, modules)

    @abstractmethod
    def build_auxiliary(self, network: Network, module: int) -> nn.Module:
        """Fresh auxiliary network of local module ``module`` (never asked for the last one).

        Returns:
            A module with ``forward(h) -> logits`` and ``loss(h, target, **options)`` as
            :class:`auglocal_ext.auxiliary.AuxiliaryNetwork`.
        """

    def build_context(self, network: Network, module: int) -> ContextSupply | None:
        """Fresh context encoders of local module ``module`` (never asked for the first one), or None."""
        return None

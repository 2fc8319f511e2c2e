"""What a learning rule decides: where the network is cut, who looks at a module's output, what else it is fed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..auxiliary.base import Auxiliary
from ..auxiliary.context import ContextSupply
from ..auxiliary.heads import CONV_HEADS, conv_head
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

    @property
    def last_width(self) -> int:
        """Channels of the last stage: of the deepest layer before the classifier."""
        last = self.layers[-1]
        return last.block.conv3.out_channels if last.kind == "bottleneck" else last.width

    def last_layer(self, module: int) -> Layer:
        """The layer with which local module ``module`` ends."""
        return self.layers[self.ends[module]]

    def children_of(self, layer: Layer) -> list[nn.Module]:
        """The children of ``primary`` that form ``layer``."""
        return list(self.primary)[layer.start : layer.stop]

    def body_of(self, layer: Layer) -> list[nn.Module]:
        """:meth:`children_of` without the classifier, which belongs to the last layer."""
        children = self.children_of(layer)
        if layer.index < len(self.layers) - 1:
            return children
        trained = [i for i, child in enumerate(children) if next(child.parameters(), None) is not None]
        return children[: trained[-1]]


class Rule(ABC):
    """A local learning rule: builds the auxiliary network and the context of each local module.

    A subclass composes parts of :mod:`auglocal_ext.auxiliary`; the training pass itself is the same for all.
    """

    @property
    def classifier_weight(self) -> float:
        """Weight of the last module's cross-entropy, which goes through the network's own classifier."""
        return 1.0

    def ends(self, num_layers: int, modules: int | Sequence[int] | None) -> tuple[int, ...]:
        """Index of the last layer of each local module for the user's ``modules`` argument."""
        return cut_points(num_layers, modules)

    @abstractmethod
    def build_auxiliary(self, network: Network, module: int) -> Auxiliary:
        """Fresh auxiliary network of local module ``module`` (never asked for the last one).

        Returns:
            ``forward(h)`` makes logits, ``loss(h, target, **options)`` the local loss; often an
            :class:`auglocal_ext.auxiliary.AuxiliaryNetwork`.
        """

    def build_context(self, network: Network, module: int) -> ContextSupply | None:
        """Fresh context encoders of local module ``module`` (never asked for the first one), or None."""
        return None


#: A local classifier by name (``CONV_HEADS``), or a rule whose auxiliary networks are taken.
HeadOrRule = str | Rule


def check_head(head: HeadOrRule) -> None:
    """ValueError unless ``head`` is one of ``CONV_HEADS`` or a rule."""
    if not isinstance(head, Rule) and head not in CONV_HEADS:
        raise ValueError(
            f"unknown auxiliary head {head!r}; choose one of {', '.join(CONV_HEADS)}, or a rule such as "
            "AugLocal(depth=3)"
        )


def head_ends(head: HeadOrRule | None, num_layers: int, modules: int | Sequence[int] | None) -> tuple[int, ...]:
    """Where a rule cuts whose auxiliary networks are those of ``head``."""
    if isinstance(head, Rule):
        return head.ends(num_layers, modules)
    return cut_points(num_layers, modules)


def build_task(
    head: HeadOrRule, network: Network, module: int, widen: float = 1.0, feature_dim: int = 128
) -> Auxiliary:
    """Fresh auxiliary network of local module ``module``, of the named kind or as the rule ``head`` makes it."""
    if isinstance(head, Rule):
        return head.build_auxiliary(network, module)
    shape = network.last_layer(module).shape
    return conv_head(
        head,
        shape[0],
        network.last_width,
        network.num_classes,
        widen=widen,
        feature_dim=feature_dim,
        is_map=len(shape) == 3,
    )

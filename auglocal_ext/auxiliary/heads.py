"""Auxiliary networks: from a local module's output to an output of the task and the local loss."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from torch import Tensor, nn

from ..layers import Features
from ..tasks import Scored
from .base import Auxiliary, LossContext


class Head(Auxiliary):
    """``task.readout(features(h), linear)``: what ends an auxiliary network.

    A subclass makes ``linear`` with ``settings.task.outputs`` outputs and the features it takes. The linear layer goes
    to the task unevaluated, with the features and their layout, so that a task can fuse pooling, product and loss.

    Attributes:
        read: what :meth:`features` returns, described.
        linear: the last layer.
    """

    can_recompute = True
    read: Features
    linear: nn.Linear

    @abstractmethod
    def features(self, h: Tensor) -> Tensor:
        """The input of ``linear``, ``(N, *read.shape)``; the task pools it over its positions."""

    def forward(self, h: Tensor) -> Tensor:
        return self.settings.task.readout(self.features(h), self.read, self.linear)

    def loss(self, h: Tensor, context: LossContext) -> Scored:
        return self.settings.task.readout_score(self.features(h), self.read, self.linear, context.target)

    def check_target(self, target: Tensor) -> None:
        self.settings.task.check_form(target, len(target))


class AuxiliaryNetwork(Auxiliary):
    """Blocks, then a head: ``head(blocks(h))``.

    With ``recompute`` the loss keeps only the input of each block and runs the block again for its backward.

    Args:
        blocks: map the module's output to the head's input.
        head: makes output and loss; may be another auxiliary network.
    """

    can_recompute = True

    def __init__(self, blocks: nn.Sequential, head: Auxiliary) -> None:
        super().__init__(head.settings)
        self.blocks = blocks
        self.head = head

    def forward(self, h: Tensor) -> Tensor:
        return self.head(self.blocks(h))

    def loss(self, h: Tensor, context: LossContext) -> Scored:
        if not self.settings.recompute:
            return self.head.loss(self.blocks(h), context)
        for block in self.blocks:
            h = self.run(block, h)
        return self.head.loss(h, context)

    def after_step(self) -> None:
        self.head.after_step()


def preceded(blocks: Iterable[nn.Module], auxiliary: Auxiliary) -> AuxiliaryNetwork:
    """``auxiliary`` with blocks in front of it, as one network."""
    if isinstance(auxiliary, AuxiliaryNetwork):
        return AuxiliaryNetwork(nn.Sequential(*blocks, *auxiliary.blocks), auxiliary.head)
    return AuxiliaryNetwork(nn.Sequential(*blocks), auxiliary)

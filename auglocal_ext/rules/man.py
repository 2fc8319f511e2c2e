"""MAN: the auxiliary network holds a moving average of the next block."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..auxiliary.base import Auxiliary, LocalLoss
from ..partition import evaluating, probe_input
from .base import HeadOrRule, Network, Rule, build_task, check_head, head_ends


class MomentumNetwork(Auxiliary):
    """``head(trained(h) + average(h))``: a trained copy of the next block, and a moving average of that block.

    The average's parameters follow ``average = m average + (1 - m) block`` after each training pass of the module and
    get no gradients; its BatchNorm statistics are its own.

    Args:
        block: the next block of the network. It is looked at, not owned.
        head: auxiliary network on the block's output.
        momentum: m.
    """

    def __init__(self, block: nn.Module, head: Auxiliary, momentum: float) -> None:
        super().__init__()
        self.trained = copy.deepcopy(block)
        self.average = copy.deepcopy(block).requires_grad_(False)
        self.head = head
        self.momentum = momentum
        self.reads_image, self.classifies = head.reads_image, head.classifies
        self._followed = (block,)  # in a tuple, so that it is no submodule of this one

    def forward(self, h: Tensor) -> Tensor:
        return self.head(self.trained(h) + self.average(h))

    def loss(self, h: Tensor, target: Tensor, **options: Any) -> LocalLoss:
        return self.head.loss(self.trained(h) + self.average(h), target, **options)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the average towards the block."""
        average: list[Tensor] = list(self.average.parameters())
        torch._foreach_lerp_(average, list(self._followed[0].parameters()), 1 - self.momentum)
        self.head.after_step()


@dataclass(frozen=True)
class MAN(Rule):
    """Each local module is trained through ``head(trained(h) + average(h))``, two copies of the next block.

    One is trained with the module; the other is a moving average of the next block's parameters, updated after the
    module's backward, when the block has not been stepped for this batch. Both start as copies of the block.

    Args:
        momentum: m in ``average = m average + (1 - m) block``, within 0 .. 1.
        head: what looks at the block's output: a name as of :class:`auglocal_ext.ContSup`, or a rule whose auxiliary
            networks take its place, such as ``DGL()`` or ``InfoPro(...)``, the two that the paper uses.

    Raises:
        ValueError: for a momentum outside 0 .. 1 or an unknown head.

    Source: Su et al., Momentum Auxiliary Network for Supervised Local Learning, ECCV 2024; m = 0.995 there. The paper's
    "learnable bias" is the trained copy, as in the released code.
    """

    momentum: float = 0.995
    head: HeadOrRule = "1c2f"

    def __post_init__(self) -> None:
        if not 0.0 <= self.momentum <= 1.0:
            raise ValueError(f"momentum is within 0 .. 1; got {self.momentum!r}")
        check_head(self.head)

    def ends(self, num_layers: int, modules: int | Sequence[int] | None) -> tuple[int, ...]:
        return head_ends(self.head, num_layers, modules)

    def build_auxiliary(self, network: Network, module: int) -> MomentumNetwork:
        here, after = network.ends[module], network.ends[module] + 1
        block = nn.Sequential(*network.body_of(network.layers[after]))
        with evaluating(block):
            shape = tuple(block(probe_input(block, network.layers[here].shape)).shape[1:])
        # To the head the module ends one layer later, before the classifier if that layer holds it.
        layers = (*network.layers[:after], replace(network.layers[after], shape=shape), *network.layers[after + 1 :])
        ends = tuple(after if k == module else end for k, end in enumerate(network.ends))
        head = build_task(self.head, replace(network, layers=layers, ends=ends), module)
        return MomentumNetwork(block, head, self.momentum)

"""MAN: the auxiliary network holds a moving average of the next block."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from .._torch import foreach_lerp_
from ..auxiliary.base import Auxiliary, LossContext
from ..auxiliary.followed import Followed
from ..models.blocks import initialise
from ..nn import is_sharded, sharded
from ..tasks import Scored
from .base import Head, Network, Rule, resolved
from .body import body
from .options import head_option, option


class MomentumNetwork(Auxiliary):
    """``head(trained(h) + average(h))``: a trained copy of the next block, and a moving average of that block.

    The average's parameters follow ``average = m average + (1 - m) block`` after each training pass of the module and
    get no gradients; its BatchNorm statistics are its own.

    Args:
        block: the next block of the network; it stays outside this module and is only read.
        head: auxiliary network on the block's output.
        momentum: m.
        afresh: whether the copies' convolutions and BatchNorms are initialised again, each on its own.

    Raises:
        ValueError: for parameters of a dtype in which the average would stand still, and where there is nothing to
            initialise again.
    """

    can_recompute = True
    follows_layers = True

    def __init__(self, block: nn.Module, head: Auxiliary, momentum: float, afresh: bool = False) -> None:
        super().__init__(head.settings)
        for parameter in block.parameters():
            _refuse_standstill(parameter.dtype, momentum)
        self.trained = _copied(block)
        self.average = _copied(block).requires_grad_(False)
        if afresh:
            if not any(isinstance(part, nn.Conv2d) for part in block.modules()):
                raise ValueError(
                    "MAN(init='released') initialises the convolutions of the next block's copies again, but a next "
                    "block here has none: leave init out"
                )
            initialise(self.trained)
            initialise(self.average)
        self.head = head
        self.momentum = momentum
        self._followed = Followed((block,))

    def forward(self, h: Tensor) -> Tensor:
        return self.head(self.trained(h) + self.average(h))

    def loss(self, h: Tensor, context: LossContext) -> Scored:
        return self.head.loss(self.run(self.trained, h) + self.run(self.average, h), context)

    def follows(self) -> Sequence[Followed]:
        return (self._followed,)

    @torch.no_grad()
    def after_step(self) -> None:
        """Move the average towards the block."""
        average: list[Tensor] = list(self.average.parameters())
        followed = list(self._followed.values())
        alike = all(is_sharded(a) == is_sharded(b) for a, b in zip(average, followed, strict=True))
        if not alike or (any(map(sharded, self._followed.layers)) and not sharded(self.average)):
            raise RuntimeError(
                "MAN's average cannot follow a block whose parameters are sharded, unless its own are too: leave "
                "fully_shard out, or pass shard=True to LocalStep"
            )
        if average:
            _refuse_standstill(average[0].dtype, self.momentum)
        foreach_lerp_(average, followed, 1 - self.momentum)
        self.head.after_step()


def _refuse_standstill(dtype: torch.dtype, momentum: float) -> None:
    """ValueError where ``(1 - m) (block - average)`` is lost in rounding."""
    if momentum == 1 or not dtype.is_floating_point:
        return
    finest = 16 * torch.finfo(dtype).eps
    if 1 - momentum < finest:
        raise ValueError(
            f"MAN(momentum={momentum:g}) moves its average by {1 - momentum:.3g} of a difference, which {dtype} "
            "rounds away. Keep float32 parameters and use torch.autocast, or take a momentum of at most "
            f"{1 - finest:.3g}"
        )


def _copied(block: nn.Module) -> nn.Module:
    """A copy with tensors of its own; of fake tensors too, whose storage cannot be copied."""
    memo: dict[int, Tensor] = {}
    for tensor in (*block.parameters(), *block.buffers()):
        made = tensor.detach().clone()
        memo[id(tensor)] = nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
    return copy.deepcopy(block, memo)


@dataclass(frozen=True)
class MAN(Rule):
    """Each local module is trained through ``head(trained(h) + average(h))``, two copies of the next block.

    One is trained with the module; the other is a moving average of the next block's parameters, updated after the
    module's backward, before the block is stepped for this batch. Both start as copies of the block, unless ``init``
    says otherwise. The block is the next layer; if that is the last one, it is taken without the classifier and the
    pooling and flattening before it.

    Args:
        momentum: m in ``average = m average + (1 - m) block``, within 0 .. 1.
        head: the classifier on the block's output: a name as for :class:`auglocal_ext.ContSup`, or a rule whose
            auxiliary networks take its place, such as ``DGL()`` or ``InfoPro(...)``, the two that the paper uses.
        init: ``"own"``: exact copies. ``"released"``: the convolutions (variance 2 / (k C)) and BatchNorms of each copy
            are initialised again after copying, so that it starts from values of its own.

    Raises:
        ValueError: for a momentum outside 0 .. 1, an unknown head or ``init``; when wrapped, for ``init="released"``
            where the next block has no convolution.

    Source: Su et al., Momentum Auxiliary Network for Supervised Local Learning, ECCV 2024; m = 0.995 there. The paper's
    "learnable bias" is the trained copy, as in the released code.
    """

    name = "man"
    follows_layers = True

    momentum: float = option(
        0.995, "m in average = m average + (1 - m) block", name="average_momentum", least=0, most=1
    )
    head: Head = head_option("1c2f")
    init: str = option("own", "initial values of the auxiliary networks", choices=("own", "released"))

    def build_auxiliary(self, network: Network, module: int) -> MomentumNetwork:
        after = network.ends[module] + 1
        if after == len(network.layers):
            raise ValueError(
                "MAN copies the next layer, and its head the one after that if it is MAN too, but the network has "
                f"{len(network.layers)} layers and none after layer {after - 1}; choose another head"
            )
        block, features = body(network, after, "MAN")
        # To the head the module ends one layer later, before the classifier if that layer holds it.
        ends = tuple(after if k == module else end for k, end in enumerate(network.ends))
        seen = replace(network, ends=ends).with_features(module, features)
        head = resolved(self.head).build_auxiliary(seen, module)
        return MomentumNetwork(block, head, self.momentum, afresh=self.init == "released")

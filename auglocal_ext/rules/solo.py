"""SOLO: local modules of a language model share its final readout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..auxiliary.base import Auxiliary, LossContext, LossSettings
from ..auxiliary.followed import Followed
from ..auxiliary.heads import AuxiliaryNetwork
from ..layers import Features, split_readout
from ..nn import is_sharded
from ..tasks import Scored
from .base import Network, Rule
from .copied import copied_block
from .heads import readout_norm
from .options import option

Borrowing = Literal["shared", "private", "random"]
#: Values of SOLO's ``readout``.
READOUTS: tuple[str, ...] = get_args(Borrowing)


class Lent(NamedTuple):
    """The values of a linear layer that is read and not trained."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class ScaledReadout(Auxiliary):
    """``tau W norm(h) + b`` with a learned scale tau, which starts at 1.

    Args:
        features: those of ``h``, tokens.
        settings: of any task.
        norm: of each token.
        readout: W and b: a linear layer of its own, or the parameters of the network's last one, which are read.

    Raises:
        RuntimeError: when called, for a readout whose parameters are sharded over processes.
    """

    can_recompute = True

    def __init__(
        self, features: Features, settings: LossSettings, norm: nn.Module, readout: nn.Linear | Followed
    ) -> None:
        super().__init__(settings)
        self._features = features
        self.norm = norm
        self.scale = nn.Parameter(torch.ones(1))  # a single number could not be sharded
        self.own = readout if isinstance(readout, nn.Linear) else None
        self._followed = readout if isinstance(readout, Followed) else None
        self.follows_layers = self.follows_whole = self._followed is not None

    def _read(self, h: Tensor) -> Tensor:
        normed = self.norm(h)
        return self.scale.to(normed.dtype) * normed

    @property
    def readout(self) -> nn.Linear:
        """W and b as this step reads them."""
        if self.own is not None:
            return self.own
        assert self._followed is not None
        values = self._followed.values()
        if any(map(is_sharded, values)):
            raise RuntimeError(
                "SOLO's modules read the whole final readout, and its parameters are sharded: leave shard=True out, or "
                'take readout="private"'
            )
        return cast("nn.Linear", Lent(*values))

    def forward(self, h: Tensor) -> Tensor:
        return self.settings.task.readout(self._read(h), self._features, self.readout)

    def loss(self, h: Tensor, context: LossContext) -> Scored:
        return self.settings.task.readout_score(self._read(h), self._features, self.readout, context.target)

    def follows(self) -> Sequence[Followed]:
        return () if self._followed is None else (self._followed,)


@dataclass(frozen=True)
class SOLO(Rule):
    """Each local module is trained through ``tau W norm(blocks(h)) + b``, W the network's own final readout, only read.

    The blocks are fresh copies of the module's last layer (of the next one, if the module is the embedding alone), the
    normalisation is of the kind of the network's last one, and tau is a learned scale that starts at 1. W and b are
    trained by the last module's loss alone; they get no gradient from other modules. All losses have the weight 1. For
    language modelling the logits are never made.

    After SOLO, reconstructed from summaries: neither the paper's code nor its tables were at hand. What they leave open
    is an option here, or stated above.

    Args:
        blocks: fresh blocks of an auxiliary network; 2 in the summaries.
        readout: ``"shared"``: the network's own; ``"private"``: a linear layer of the module's own, trained with it;
            ``"random"``: one that keeps its random initial values.
        every: S, steps after which the copy of a shared readout is renewed. 1: it is read as it is when a step begins.
        lag: steps from the state that is read to the first step that reads it, see
            :class:`auglocal_ext.auxiliary.Followed`. Over stages a lag keeps earlier ones from waiting for the last.

    Raises:
        ValueError: for an option out of range, and for ``every`` or ``lag`` without a shared readout; when wrapped, for
            modules that do not end in tokens, for a network that does not end in a linear layer, or in one of another
            width, and for layers of which no fresh copy can be made.

    Source: SOLO, arXiv 2609.35440, by summaries of it.
    """

    name = "solo"
    follows_layers = True

    blocks: int = option(2, "fresh blocks of an auxiliary network", name="solo_blocks", least=0)
    readout: Borrowing = option("shared", "the readout of auxiliary networks", kind=str, choices=READOUTS)
    every: int = option(1, "steps after which a shared readout is renewed", name="readout_every", least=1)
    lag: int = option(0, "steps by which a shared readout is older", name="readout_lag", least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.readout != "shared" and (self.every, self.lag) != (1, 0):
            raise ValueError(
                f"every={self.every} and lag={self.lag} are of a shared readout; readout={self.readout!r} has neither"
            )

    def build_auxiliary(self, network: Network, module: int) -> AuxiliaryNetwork:
        features, settings = network.features(module), network.settings(module)
        if not features.is_tokens:
            raise ValueError(
                f"SOLO normalises and reads tokens (T, C), but local module {module} puts out {features}: take another "
                "rule, such as AugLocal(depth=3)"
            )
        final = _final_readout(network)
        end = network.ends[module]
        blocks: list[nn.Module] = []
        for _ in range(self.blocks):
            block, features = copied_block(network, end if end else 1, features, "SOLO")
            blocks.append(block)
        if features.channels != final.in_features:
            raise ValueError(
                f"SOLO reads the network's final linear layer, which takes {final.in_features} features, after local "
                f"module {module}, whose auxiliary blocks put out {features}: choose other modules"
            )
        readout: nn.Linear | Followed
        if self.readout == "shared":
            readout = Followed((final,), every=self.every, lag=self.lag)
        else:
            readout = nn.Linear(final.in_features, final.out_features, final.bias is not None)
            readout.requires_grad_(self.readout == "private")
        head = ScaledReadout(features, settings, readout_norm(network, features.channels), readout)
        return AuxiliaryNetwork(nn.Sequential(*blocks), head)


def _final_readout(network: Network) -> nn.Linear:
    """The linear layer in which the network ends."""
    split = split_readout(network.children_of(network.layers[-1]))
    if split is None:
        raise ValueError(
            "SOLO reads the nn.Linear in which a network ends, and this one ends in something else, or in a linear "
            "layer with hooks or a forward of its own: take another rule, such as AugLocal(depth=3)"
        )
    return split[1]

"""PredSim: prediction loss and similarity matching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..auxiliary.base import Auxiliary
from ..auxiliary.heads import AuxiliaryNetwork, PredictionHead
from ..auxiliary.objectives import Objectives, SimilarityLoss
from .base import HeadOrRule, Network, Rule, build_task, check_head, head_ends


@dataclass(frozen=True)
class PredSim(Rule):
    """``(1 - beta) CE(pred(h), y) + beta mean((S(std_p(conv(h))) - S(onehot(y)))^2)``.

    The last module's cross-entropy, through the network's own classifier, is weighted by 1 - beta too.

    Args:
        beta: weight of the similarity loss, within 0 .. 1.
        limit: features that the prediction layer is fed, at most.
        head: None for the method's own prediction layer, or any other: a name or a rule whose auxiliary networks
            take its place, such as ``AugLocal(depth=3)``.

    Raises:
        ValueError: for ``beta`` outside 0 .. 1, a ``limit`` below 1 or an unknown head.

    Source: Noekland and Eidnes, Training Neural Networks with Local Error Signals, ICML 2019; beta = 0.99 there. Each
    layer's own Adam optimizer and dropout are matters of training, not of the rule.
    """

    beta: float = 0.99
    limit: int = 2048
    head: HeadOrRule | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta is the weight of the similarity loss, within 0 .. 1; got {self.beta!r}")
        if self.limit < 1:
            raise ValueError(f"limit is a number of features, at least 1; got {self.limit!r}")
        if self.head is not None:
            check_head(self.head)

    @property
    def classifier_weight(self) -> float:
        return 1 - self.beta

    def ends(self, num_layers: int, modules: int | Sequence[int] | None) -> tuple[int, ...]:
        return head_ends(self.head, num_layers, modules)

    def build_auxiliary(self, network: Network, module: int) -> Objectives:
        shape = network.last_layer(module).shape
        if self.head is None:
            task: Auxiliary = AuxiliaryNetwork(nn.Sequential(), PredictionHead(shape, network.num_classes, self.limit))
        else:
            task = build_task(self.head, network, module)
        similarity = SimilarityLoss(shape[0], network.num_classes, is_map=len(shape) == 3)
        return Objectives(task, 1 - self.beta, [(self.beta, similarity)])

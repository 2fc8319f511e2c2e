"""PredSim: prediction loss and similarity matching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..auxiliary.objectives import Objectives, SimilarityLoss
from ..partition import cut_points
from ..tasks.classification import classes_of
from .base import Head, Network, Rule, resolved
from .heads import PredictionHead
from .options import head_option, option


@dataclass(frozen=True)
class PredSim(Rule):
    """``(1 - beta) CE(pred(h), y) + beta mean((S(std_p(conv(h))) - S(onehot(y)))^2)``.

    The last module's cross-entropy, through the network's own classifier, is weighted by 1 - beta too. Replicas compare
    the samples of their own part of a batch, unless ``LocalStep(gather_features=True)``.

    Args:
        beta: weight of the similarity loss, within 0 .. 1.
        limit: largest number of features the prediction layer takes; 2048 by default. No other head uses it.
        head: None for the method's own prediction layer (:class:`auglocal_ext.rules.PredictionHead`), or any other: a
            name or a rule whose auxiliary networks take its place, such as ``AugLocal(depth=3)``.
        scale_classifier: False gives the last module's cross-entropy the weight 1, as AugLocal's experiments do.
        zero_padding: pool over positions padded with zeros, as the released code does
            (:class:`auglocal_ext.rules.PredictionHead`).
        init: the prediction layer starts from zeros (``"own"``), from weights of 0 and torch's random biases
            (``"released"``), or as torch makes it (``"auglocal"``, AugLocal's experiments). The convolution before the
            similarities starts as torch makes it, in AugLocal's experiments from variance 2 / (k C).
        classifier_apart: as in the released code, the last layer has the two losses of all others, and the network's
            own classifier is one more local module, trained alone. The number and the cut points of ``modules`` are
            those of the others; of one module it is ordinary backpropagation.

    Raises:
        ValueError: for ``beta`` outside 0 .. 1, a ``limit`` below 1, an unknown head or ``init``, and a ``limit``,
            ``zero_padding`` or ``init="released"`` that nothing uses; when wrapped, for any task but classification.

    Source: Noekland and Eidnes, Training Neural Networks with Local Error Signals, ICML 2019; beta = 0.99 there. Each
    layer's own Adam optimizer and dropout are matters of training, not of the rule.
    """

    name = "predsim"

    beta: float = option(0.99, "weight of the similarity loss", least=0, most=1)
    limit: int | None = option(None, "largest number of features the prediction layer takes, by default 2048", least=1)
    head: Head | None = head_option(None, "its own prediction layer, a head or a rule")
    scale_classifier: bool = option(True, "the last module's cross-entropy has weight 1 - beta too, not 1")
    zero_padding: bool = option(False, "the prediction layer pools over positions padded with zeros, as released")
    init: str = option("own", "initial values of the auxiliary networks", choices=("own", "released", "auglocal"))
    classifier_apart: bool = option(False, "the last layer has both losses too, and the classifier is trained alone")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head is not None:
            for name, given in (
                ("limit", self.limit is not None),
                ("zero_padding", self.zero_padding),
                ("init", self.init == "released"),
            ):
                if given:
                    raise ValueError(
                        f"{name}={getattr(self, name)} is read by PredSim's own prediction layer alone, not by "
                        f"head={self.head!r}"
                    )
            if resolved(self.head).classifier_apart and not self.classifier_apart:
                raise ValueError(f"head={self.head!r} trains the classifier alone: say classifier_apart=True here too")

    @property
    def head_rule(self) -> Rule:
        if self.head is not None:
            return resolved(self.head)
        return PredictionHead(2048 if self.limit is None else self.limit, self.zero_padding, self.init)

    def ends(self, num_layers: int, modules: int | Sequence[int] | None) -> tuple[int, ...]:
        if not self.classifier_apart:
            return super().ends(num_layers, modules)
        ends = cut_points(num_layers - 1, modules)
        return (*(ends if len(ends) > 1 or modules is None else ()), num_layers - 1)

    def option_values(self) -> dict[str, Any]:
        values = super().option_values()
        if isinstance(head := self.head_rule, PredictionHead):
            values["limit"] = head.limit
        return values

    @property
    def classifier_weight(self) -> float:
        return 1 - self.beta if self.scale_classifier else 1.0

    def build_auxiliary(self, network: Network, module: int) -> Objectives:
        classes_of(network.task, "PredSim's similarity loss")
        head = self.head_rule.build_auxiliary(network, module)
        normal = self.init == "auglocal"
        similarity = SimilarityLoss(network.features(module), network.settings(module), normal)
        return Objectives(head, 1 - self.beta, [(self.beta, similarity)])

"""InfoPro: reconstruction of the image beside a classifier or a contrastive loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, get_args

from ..auxiliary.objectives import Objectives, ReconstructionLoss
from ..tasks import SupervisedContrast
from .base import Head, Network, Rule
from .heads import sized_head, unread_widths, why_unread, widened
from .options import Option, head_option, option

Weights = tuple[float, float]
Loss = Literal["softmax", "contrast", "contrast_batch"]


@dataclass(frozen=True)
class InfoPro(Rule):
    """``lambda1(k) mean(BCE(decoder(h), image)) + lambda2(k) L_task(h, y)``, the weights linear over the local modules.

    L_task is the cross-entropy of the head's logits, or the supervised contrastive loss of its features. The last
    module is trained by the cross-entropy of the network's own classifier alone. With contrast replicas compare the
    samples of their own part of a batch, unless ``LocalStep(gather_features=True)``.

    Args:
        first: ``(lambda1, lambda2)`` of the first local module.
        last: those of the last one that has an auxiliary network.
        loss: ``"softmax"``, ``"contrast"`` (temperature 0.07), or ``"contrast_batch"``: the contrastive loss divided by
            the size of the batch, as in the released code, and not by the number of samples that have another one of
            their class.
        head: the classifier on a module's output, by name as for :class:`auglocal_ext.ContSup`, or a rule whose
            auxiliary networks are used, such as ``AugLocal(depth=3)``. With contrast it puts out ``feature_dim``
            features.
        feature_dim: features of the contrastive loss and of the hidden linear layers of a head given by name; None:
            128.
        mean: per channel, in units of [0, 1]: the network's input is ``(image - mean) / std``. The defaults are for
            images in [0, 1] that were not normalised.
        std: per channel, in the same units.
        widen: width factor of the decoder (12 channels inside) and of a head given by name.
        stage_steps: None: the weights are linear over the local modules. S: the weights of a module are ``first + (last
            - first) s / S``, where s is the stage, from 1, of the layer whose output is decoded: the number of widths
            up to it. MAN's released code has it so, with S = K - 2.
        init: ``"released"`` leaves the biases of the decoder's convolutions as torch makes them; ``"own"`` has zeros.

    Raises:
        ValueError: for weights that are negative or not finite, an unknown loss, head or ``init``, and a
            ``feature_dim`` or ``widen`` that nothing uses; when wrapped, for modules that put out no maps, for a
            ``mean`` that does not fit the image's channels, for more stages than make weights of at least 0, and for a
            contrastive loss with any task but classification without label smoothing.

    Source: Wang et al., Revisiting Locally Supervised Learning: an Alternative to End-to-end Training, ICLR 2021;
    ``INFOPRO_WEIGHTS`` holds its weights.
    """

    name = "infopro"

    first: Weights
    last: Weights
    loss: Loss = option("softmax", "loss of the head's output", kind=str, choices=get_args(Loss))
    head: Head = head_option("1c2f")
    feature_dim: int | None = option(
        None, "features of contrast and of a named head's hidden layers, by default 128", least=1
    )
    mean: Sequence[float] = (0.0, 0.0, 0.0)
    std: Sequence[float] = (1.0, 1.0, 1.0)
    widen: float = option(1.0, "width factor of the decoder and of a named head", above=0)
    stage_steps: int | None = option(
        None, "weights change by stage, in this many steps, not by module", metavar="S", least=1
    )
    init: str = option("own", "initial values of the auxiliary networks", choices=("own", "released"))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("first", "last"):
            weights = getattr(self, name)
            if len(weights) != 2 or not all(0 <= weight < math.inf for weight in weights):
                raise ValueError(f"{name} is (lambda1, lambda2), finite and neither negative; got {weights!r}")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean and std need one value per channel each; got {self.mean!r} and {self.std!r}")
        if not all(map(math.isfinite, (*self.mean, *self.std))):
            raise ValueError(f"mean and std must be finite; got {self.mean!r} and {self.std!r}")
        unread = unread_widths(self.head)
        if self.feature_dim is not None and self.loss == "softmax" and "feature_dim" in unread:
            raise ValueError(f"feature_dim={self.feature_dim} is read by nothing here: {why_unread(self.head)}")
        if self.widen != 1 and "widen" in unread and not (self.first[0] or self.last[0]):
            raise ValueError(f"widen={self.widen} is read by nothing here: no decoder, and {why_unread(self.head)}")

    @property
    def head_rule(self) -> Rule:
        return sized_head(self.head, self.widen, self.feature_dim)

    @classmethod
    def options(cls) -> list[Option]:
        text = (
            "lambda1 and lambda2 (reconstruction, --loss) of the first local module, then of the last; left out, "
            "those of InfoPro's experiments for the data set, network and number of modules"
        )
        return [*super().options(), Option("weights", tuple[float, ...], text, "", None, "A,B,C,D")]

    @classmethod
    def of_options(cls, values: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]) -> InfoPro:
        weights = values.get("weights", ())  # which have no default
        if len(weights) != 4:
            raise ValueError(
                "--weights are four numbers, lambda1 and lambda2 of the first local module and of the last; got "
                + (",".join(f"{weight:g}" for weight in weights) or "none")
            )
        own = {name: value for name, value in values.items() if name != "weights"}
        return cls(tuple(weights[:2]), tuple(weights[2:]), mean=tuple(mean), std=tuple(std), **own)

    def option_values(self) -> dict[str, Any]:
        own = {each.name: getattr(self, each.field) for each in self.options() if each.field}
        return own | {"weights": (*self.first, *self.last)}

    def weights(self, network: Network, module: int) -> Weights:
        """``(lambda1, lambda2)`` of local module ``module``."""
        if self.stage_steps is None:
            share = module / max(1, network.num_modules - 2)
        else:
            share = _stage(network, module) / self.stage_steps
        reconstruction, task = (a + (b - a) * share for a, b in zip(self.first, self.last, strict=True))
        if min(reconstruction, task) < 0:
            raise ValueError(
                f"stage_steps={self.stage_steps} makes the weights of local module {module}, in stage "
                f"{_stage(network, module)}, ({reconstruction:g}, {task:g}): a negative one would maximise its loss. "
                "Take at least as many steps as there are stages"
            )
        return reconstruction, task

    def build_auxiliary(self, network: Network, module: int) -> Objectives:
        features, image, settings = network.features(module), network.image("InfoPro"), network.settings(module)
        ReconstructionLoss.check_features(features, image, self.mean)
        looked_at = network
        if self.loss != "softmax":
            dim = 128 if self.feature_dim is None else self.feature_dim
            mean_over: Literal["anchors", "batch"] = "anchors" if self.loss == "contrast" else "batch"
            looked_at = replace(network, task=SupervisedContrast(dim, network.task, mean_over=mean_over))
        head = self.head_rule.build_auxiliary(looked_at, module)
        reconstruction, classification = self.weights(network, module)
        decoder = ReconstructionLoss(
            *(features, image, self.mean, self.std, settings, widened(12, self.widen)),
            zero_biases=self.init == "own",
        )
        return Objectives(head, classification, [(reconstruction, decoder)])


def _stage(network: Network, module: int) -> int:
    """Number of runs of layers of equal width up to the one with which a local module ends."""
    widths = [layer.width for layer in network.layers[: network.ends[module] + 1]]
    return len(list(groupby(widths)))


#: ``(first, last)`` of the paper's contrastive experiments, as :class:`InfoPro` takes them: by data set and network,
#: then by number of local modules. The starred, memory-balanced partitions of ResNet-110 have entries of their own;
#: they are cut as :data:`auglocal_ext.partition.CONTSUP_BALANCED` says, but STL-10's three after the layers 9 and 20.
INFOPRO_WEIGHTS: dict[tuple[str, str], dict[int, tuple[Weights, Weights]]] = {
    ("cifar10", "resnet32"): {
        2: ((5, 1), (0, 0)),
        4: ((6, 0), (1, 2)),
        8: ((5, 0), (0, 2)),
        16: ((5, 0.05), (0.2, 0.5)),
    },
    ("cifar10", "resnet110"): {
        2: ((5, 0.5), (0, 0)),
        4: ((1, 0), (0, 1)),
        8: ((5, 0), (0, 1)),
        16: ((5, 0), (0.5, 1)),
    },
    ("cifar10", "resnet110, balanced"): {
        2: ((5, 0.1), (0, 0)),
        3: ((5, 0), (5, 0.1)),
        4: ((5, 0), (5, 0.1)),
    },
    ("stl10", "resnet110"): {
        2: ((10, 1), (0, 0)),
        4: ((20, 0.2), (5, 2)),
        8: ((20, 0.2), (5, 1)),
        16: ((20, 0.5), (10, 0.1)),
    },
    ("stl10", "resnet110, balanced"): {
        2: ((20, 1), (0, 0)),
        3: ((20, 0.5), (5, 2)),
        4: ((20, 0.5), (10, 1)),
    },
    ("svhn", "resnet110"): {
        2: ((1, 0.1), (0, 0)),
        4: ((5, 0), (0.5, 1)),
        8: ((5, 0), (0.5, 2)),
        16: ((5, 0.2), (0.5, 1)),
    },
}

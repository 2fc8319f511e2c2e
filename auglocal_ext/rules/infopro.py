"""InfoPro: reconstruction of the image beside a classifier or a contrastive loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ..auxiliary.base import Auxiliary
from ..auxiliary.objectives import ContrastiveNetwork, Objectives, ReconstructionLoss
from .base import HeadOrRule, Network, Rule, build_task, check_head, head_ends

Weights = tuple[float, float]


@dataclass(frozen=True)
class InfoPro(Rule):
    """``lambda1(k) mean(BCE(decoder(h), image)) + lambda2(k) L_task(h, y)``, the weights linear over the local modules.

    L_task is the cross-entropy of the head's logits, or the supervised contrastive loss of its features. The last
    module is trained by the cross-entropy of the network's own classifier alone.

    Args:
        first: ``(lambda1, lambda2)`` of the first local module.
        last: those of the last one that has an auxiliary network.
        loss: ``"softmax"`` or ``"contrast"`` (temperature 0.07).
        head: local classifier, as of :class:`auglocal_ext.ContSup`, or a rule whose auxiliary networks take its
            place, such as ``AugLocal(depth=3)``. With ``loss="contrast"`` it puts out ``feature_dim`` features.
        feature_dim: features of the contrastive loss.
        mean, std: per channel, in units of [0, 1], by which images were normalised before the network. The
            defaults are for images in [0, 1] that were not.

    Raises:
        ValueError: for negative weights, an unknown loss or head; when wrapped, for networks on vectors and for a
            ``mean`` that does not fit the image's channels.

    Source: Wang et al., Revisiting Locally Supervised Learning: an Alternative to End-to-end Training, ICLR 2021;
    ``INFOPRO_WEIGHTS`` holds its weights.
    """

    first: Weights
    last: Weights
    loss: Literal["softmax", "contrast"] = "softmax"
    head: HeadOrRule = "1c2f"
    feature_dim: int = 128
    mean: Sequence[float] = (0.0, 0.0, 0.0)
    std: Sequence[float] = (1.0, 1.0, 1.0)

    def __post_init__(self) -> None:
        for name in ("first", "last"):
            weights = getattr(self, name)
            if len(weights) != 2 or min(weights) < 0:
                raise ValueError(f"{name} is (lambda1, lambda2), neither negative; got {weights!r}")
        if self.loss not in ("softmax", "contrast"):
            raise ValueError(f"loss is 'softmax' or 'contrast'; got {self.loss!r}")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean and std need one value per channel each; got {self.mean!r} and {self.std!r}")
        check_head(self.head)

    def ends(self, num_layers: int, modules: int | Sequence[int] | None) -> tuple[int, ...]:
        return head_ends(self.head, num_layers, modules)

    def weights(self, network: Network, module: int) -> Weights:
        """``(lambda1, lambda2)`` of local module ``module``."""
        share = module / max(1, network.num_modules - 2)
        reconstruction, task = (a + (b - a) * share for a, b in zip(self.first, self.last, strict=True))
        return reconstruction, task

    def build_auxiliary(self, network: Network, module: int) -> Objectives:
        shape = network.last_layer(module).shape
        if len(shape) != 3 or len(network.input_shape) != 3:
            raise ValueError(
                f"InfoPro reconstructs images of feature maps (C, H, W), but local module {module} puts out {shape} "
                f"for inputs {network.input_shape}; use Greedy() for networks on vectors"
            )
        if len(self.mean) != network.input_shape[0]:
            raise ValueError(
                f"mean and std have {len(self.mean)} channels, images {network.input_shape[0]}; pass one per channel"
            )
        task: Auxiliary
        if self.loss == "contrast":
            task = ContrastiveNetwork(build_task(self.head, replace(network, num_classes=self.feature_dim), module))
        else:
            task = build_task(self.head, network, module)
        reconstruction, classification = self.weights(network, module)
        decoder = ReconstructionLoss(shape[0], network.input_shape[0], self.mean, self.std)
        return Objectives(task, classification, [(reconstruction, decoder)])


#: ``(first, last)`` of the paper's contrastive experiments, by data set, network and number of local modules. The
#: starred, memory-balanced partitions of ResNet-110 have entries of their own.
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

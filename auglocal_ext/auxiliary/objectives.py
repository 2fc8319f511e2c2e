"""Local losses beside the classifier's: similarity matching and reconstruction of the image."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Features
from ..models.blocks import initialise
from ..nn import gathered, gathering
from ..ops.reconstruction_loss import reconstruction_loss
from ..ops.similarity_loss import channel_std, similarity_loss
from ..tasks import Scored
from ..tasks.classification import check_indices, classes_of
from .base import Auxiliary, LossContext, LossSettings, Part

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Term(Part, ABC):
    """One more loss of a module's output: ``loss(h, context)``, a scalar."""

    @abstractmethod
    def loss(self, h: Tensor, context: LossContext) -> Tensor:
        """The loss of the module's output ``h``, differentiable."""

    def after_step(self) -> None:
        """Called after each backward of the module; see :meth:`Auxiliary.after_step`."""


class Objectives(Auxiliary):
    """``weight * network(h, y) + sum_i weight_i * term_i(h, y, image)``.

    ``forward(h)`` is the network's output.

    Args:
        network: auxiliary network with a loss. With weight 0 it is not trained and only counts.
        weight: its weight.
        terms: weights and terms; those of weight 0 are left out.

    Raises:
        ValueError: if all weights are 0, which would train nothing.
    """

    can_recompute = True

    def __init__(self, network: Auxiliary, weight: float, terms: Sequence[tuple[float, Term]]) -> None:
        super().__init__(network.settings)
        self.network = network
        self.weight = weight
        kept = [(weight, term) for weight, term in terms if weight != 0]
        if weight == 0 and not kept:
            raise ValueError("all losses of a local module have weight 0, so nothing trains it; give one a weight")
        self.weights = [weight for weight, _ in kept]
        self.terms = nn.ModuleList(term for _, term in kept)
        if weight == 0:
            network.requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        return self.network(h)

    def loss(self, h: Tensor, context: LossContext) -> Scored:
        result = self.network.loss(h if self.weight else h.detach(), context)
        loss = result.loss * self.weight
        for weight, term in zip(self.weights, self.terms, strict=True):
            loss = loss + weight * cast("Term", term).loss(h, context)
        return result._replace(loss=loss)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # What was saved before tasks were parts of their own has the network under another name.
        for key in [key for key in state_dict if key.startswith(f"{prefix}task.")]:
            state_dict[f"{prefix}network.{key.removeprefix(f'{prefix}task.')}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def after_step(self) -> None:
        self.network.after_step()
        for term in self.terms:
            cast("Term", term).after_step()


class SimilarityLoss(Term):
    """``mean((S(std_p(conv(h))) - S(onehot(y)))^2)``: images of a class should have similar features (PredSim).

    S is the adjusted cosine similarity, std_p the standard deviation of each channel over the positions, conv a
    convolution with a kernel of 3 along each axis and C channels, without bias; of tokens and vectors it is a linear
    layer. Vectors, and maps of one position, are used in place of a standard deviation. Images with the ignored
    label, or without a label, are left out. Smoothed labels have the similarities of plain ones, so label smoothing
    changes nothing here.

    Replicas compare the samples of their own part of a batch, unless ``LocalStep(gather_features=True)`` gathers the
    standard deviations ``(N, C)`` of all parts.

    Args:
        features: those of ``h``.
        settings: of a classification with class indices.
        normal: the convolution starts from a normal distribution of variance 2 / (k C), with kernels of k values, as in
            AugLocal's released code; else as torch makes it. The linear layer always does.

    Raises:
        ValueError: for another task.

    Source: Noekland and Eidnes, Training Neural Networks with Local Error Signals, ICML 2019.
    """

    can_recompute = True
    compares_samples = True

    def __init__(self, features: Features, settings: LossSettings, normal: bool = False) -> None:
        super().__init__(settings)
        self.features = features
        self.encoder: nn.Module
        channels = features.channels
        if features.is_vector or features.is_tokens:
            self.encoder = nn.Linear(channels, channels, bias=False)
        elif len(features.positions) in _CONVOLUTIONS:
            kind = _CONVOLUTIONS[len(features.positions)]
            self.encoder = kind(channels, channels, 3, padding=1, bias=False)
            if normal:
                nn.init.kaiming_normal_(self.encoder.weight, mode="fan_out", nonlinearity="relu")
        else:
            raise ValueError(f"PredSim's similarity loss is known of maps of 1 to 3 axes, not of {features}")

    def check(self, settings: LossSettings) -> None:
        super().check(settings)
        classes_of(settings.task, "PredSim's similarity loss")

    def check_target(self, target: Tensor) -> None:
        check_indices(target, "PredSim's similarity loss")

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        if self.features.is_vector or self.features.is_tokens:
            z = self.features.channels_first(self.encoder(h))
        else:
            z = self.encoder(self.features.channels_first(h))
        if z.dim() > 2 and z.shape[2:].numel() == 1:
            z = z.flatten(1)
        if gathering():
            z, target = gathered(channel_std(z) if z.dim() > 2 else z, target)
        task = classes_of(self.settings.task, "PredSim's similarity loss")
        return similarity_loss(z, target, task.num_classes, ignore_index=task.ignore_index, check_labels=False)

    def loss(self, h: Tensor, context: LossContext) -> Tensor:
        return self.run(self, h, context.target)


class ReconstructionLoss(Term):
    """``mean(BCE(decoder(h), image))``: how well the image can be decoded from the module's output (InfoPro).

    The decoder resizes h to the image (bilinear, corners aligned), then a 3x3 convolution to 12 channels, BatchNorm,
    ReLU, a 3x3 convolution to the image's channels and a sigmoid: 108 C + 363 parameters for RGB. The binary
    cross-entropy is against the image in [0, 1], which is restored from the network's normalised input. It uses no
    target, so images of the ignored label count.

    Args:
        features: those of ``h``, a map with height and width.
        image: those of the network's input.
        mean: per channel, in units of [0, 1]: the network's input is ``(image - mean) / std``.
        std: per channel, in the same units.
        settings: of any task.
        hidden: channels of the decoder between its two convolutions.
        zero_biases: whether the biases of the convolutions start at 0 rather than torch's random values.

    Raises:
        ValueError: for features or inputs that have no height and width, and for a ``mean`` of another length.

    Source: Wang et al., Revisiting Locally Supervised Learning: an Alternative to End-to-end Training, ICLR 2021.
    """

    can_recompute = True

    def __init__(
        self,
        features: Features,
        image: Features,
        mean: Sequence[float],
        std: Sequence[float],
        settings: LossSettings,
        hidden: int = 12,
        zero_biases: bool = True,
    ) -> None:
        super().__init__(settings)
        self.check_features(features, image, mean)
        self.features = features
        self.image = image
        self.decoder = nn.Sequential(
            nn.Conv2d(features.channels, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, image.channels, 3, padding=1),
        )
        initialise(self, zero_biases)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    @staticmethod
    def check_features(features: Features, image: Features, mean: Sequence[float]) -> None:
        """ValueError for features and images that this loss cannot be built for."""
        for read, what in ((features, "a module here puts out"), (image, "the network's inputs are")):
            if not read.is_2d:
                raise ValueError(
                    f"InfoPro reconstructs images from feature maps with height and width, but {what} {read}; take a "
                    "rule without reconstruction, such as Greedy() or AugLocal(depth=1)"
                )
        if len(mean) != image.channels:
            raise ValueError(
                f"mean and std have {len(mean)} channels, images {image.channels}; pass one value per channel"
            )

    def forward(self, h: Tensor, image: Tensor) -> Tensor:
        h, image = self.features.channels_first(h), self.image.channels_first(image)
        if h.shape[-2:] != image.shape[-2:]:  # of equal sizes it is the identity, and a copy
            h = F.interpolate(h, image.shape[-2:], mode="bilinear", align_corners=True)
        return reconstruction_loss(self.decoder(h), image, self.mean, self.std)

    def loss(self, h: Tensor, context: LossContext) -> Tensor:
        return self.run(self, h, context.image)

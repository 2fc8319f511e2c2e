"""Local losses beside the classifier's: similarity matching, reconstruction of the image, supervised contrast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.blocks import initialise
from ..ops.reconstruction_loss import reconstruction_loss
from ..ops.similarity_loss import similarity_loss
from ..ops.supervised_contrast import supervised_contrast
from .base import Auxiliary, LocalLoss


class Term(nn.Module):
    """One more loss of a module's output: ``forward(h, target, image, ignore_index) -> scalar``.

    Attributes:
        reads_image: whether ``image``, the network's input, is looked at.
    """

    reads_image = False

    def after_step(self) -> None:
        """Called after each backward of the module; see :meth:`Auxiliary.after_step`."""


class Objectives(Auxiliary):
    """``task_weight * task(h, y) + sum_i weight_i * term_i(h, y, image)``.

    ``forward(h)`` are the task's logits.

    Args:
        task: auxiliary network with a loss. With weight 0 it is not trained and only counts correct answers.
        task_weight: its weight.
        terms: weights and terms; those of weight 0 are left out.
    """

    def __init__(self, task: Auxiliary, task_weight: float, terms: Sequence[tuple[float, Term]]) -> None:
        super().__init__()
        self.task = task
        self.task_weight = task_weight
        kept = [(weight, term) for weight, term in terms if weight != 0]
        self.weights = [weight for weight, _ in kept]
        self.terms = nn.ModuleList(term for _, term in kept)
        self.reads_image = task.reads_image or any(term.reads_image for _, term in kept)
        self.classifies = task.classifies
        if task_weight == 0:
            task.requires_grad_(False)

    def forward(self, h: Tensor) -> Tensor:
        return self.task(h)

    def loss(
        self, h: Tensor, target: Tensor, *, image: Tensor | None = None, ignore_index: int = -100, **options: Any
    ) -> LocalLoss:
        """Weighted sum of the losses; see :meth:`Auxiliary.loss`."""
        if self.task.reads_image:
            options["image"] = image
        result = self.task.loss(h if self.task_weight else h.detach(), target, ignore_index=ignore_index, **options)
        loss = result.loss * self.task_weight
        for weight, term in zip(self.weights, self.terms, strict=True):
            loss = loss + weight * term(h, target, image, ignore_index)
        return LocalLoss(loss, result.logits, result.correct)

    def after_step(self) -> None:
        self.task.after_step()
        for term in self.terms:
            cast("Term", term).after_step()


class SimilarityLoss(Term):
    """``mean((S(std_p(conv(h))) - S(onehot(y)))^2)``: images of a class should have similar features (PredSim).

    S is the adjusted cosine similarity, std_p the standard deviation of each channel over the positions, conv a 3x3
    convolution of C channels without bias; of vectors it is a linear layer. Vectors, and maps of one position, stand
    for themselves. Images of the ignored label, or of none, count nowhere.

    Args:
        channels: C.
        num_classes: K.
        is_map: whether ``h`` has positions.

    Source: Noekland and Eidnes, Training Neural Networks with Local Error Signals, ICML 2019.
    """

    def __init__(self, channels: int, num_classes: int, is_map: bool = True) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.encoder: nn.Module
        if is_map:
            self.encoder = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        else:
            self.encoder = nn.Linear(channels, channels, bias=False)

    def forward(self, h: Tensor, target: Tensor, image: Tensor | None, ignore_index: int) -> Tensor:
        z = self.encoder(h)
        if z.dim() > 2 and z.shape[2:].numel() == 1:
            z = z.flatten(1)
        # The classifier beside it has checked the labels.
        return similarity_loss(z, target, self.num_classes, ignore_index=ignore_index, check_labels=False)


class ReconstructionLoss(Term):
    """``mean(BCE(decoder(h), image))``: how much of the image can be made of the module's output (InfoPro).

    The decoder resizes h to the image (bilinear, corners aligned), then a 3x3 convolution to 12 channels, BatchNorm,
    ReLU, a 3x3 convolution to the image's channels and a sigmoid: 108 C + 363 parameters for RGB. The binary
    cross-entropy is against the image in [0, 1], which the network's normalised input is turned back into.

    Args:
        channels: C of ``h`` ``(N, C, H', W')``.
        image_channels: channels of the image.
        mean, std: per channel, in units of [0, 1]: the network's input is ``(image - mean) / std``.

    Source: Wang et al., Revisiting Locally Supervised Learning: an Alternative to End-to-end Training, ICLR 2021.
    """

    reads_image = True

    def __init__(
        self, channels: int, image_channels: int, mean: Sequence[float], std: Sequence[float], hidden: int = 12
    ) -> None:
        super().__init__()
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, image_channels, 3, padding=1),
        )
        initialise(self)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32), persistent=False)

    def forward(self, h: Tensor, target: Tensor, image: Tensor | None, ignore_index: int) -> Tensor:
        if image is None:
            raise ValueError(
                "this module's loss reconstructs the image: pass the network's input, local_loss(out, y, image=x)"
            )
        if h.shape[-2:] != image.shape[-2:]:  # of equal sizes it is the identity, and a copy
            h = F.interpolate(h, image.shape[-2:], mode="bilinear", align_corners=True)
        return reconstruction_loss(self.decoder(h), image, self.mean, self.std)


class ContrastiveNetwork(Auxiliary):
    """An auxiliary network that is trained by supervised contrast: its features, not logits, by ``forward(h)``.

    Args:
        network: maps ``h`` to features ``(N, D)``.
        temperature: t.
    """

    classifies = False

    def __init__(self, network: nn.Module, temperature: float = 0.07) -> None:
        super().__init__()
        self.network = network
        self.temperature = temperature

    def forward(self, h: Tensor) -> Tensor:
        return self.network(h)

    def loss(self, h: Tensor, target: Tensor, *, ignore_index: int = -100, **options: Any) -> LocalLoss:
        features = self.network(h)
        loss = supervised_contrast(features, target, self.temperature, ignore_index)
        return LocalLoss(loss, features.detach(), torch.full((), -1, device=h.device))

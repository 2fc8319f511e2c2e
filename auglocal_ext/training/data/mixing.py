"""Mixup and CutMix: images of a batch mixed in pairs, labels as class probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .batches import Batches


class MixedBatches:
    """The batches of another source, each image of the training split mixed with its neighbour in the batch.

    Labels become class probabilities (B, num_classes) fp32. With both strengths above 0 each batch is mixed by one of
    the two, drawn with chance 1/2. What is drawn follows from seed, epoch and step alone, so a run that is taken up in
    the middle of an epoch draws the same.

    Args:
        source: normalised images and labels.
        mixup: alpha of Beta(alpha, alpha), the share of an image in its mixture; 0 for none.
        cutmix: alpha of Beta(alpha, alpha), the share of an image's area that it keeps; 0 for none.
        led: the source's batches begin with a neighbour of the first image, which is left out of the result.

    Source: Zhang et al., mixup, ICLR 2018; Yun et al., CutMix, ICCV 2019.
    """

    def __init__(
        self, source: Batches, num_classes: int, *, mixup: float, cutmix: float, seed: int, led: bool = False
    ) -> None:
        self.steps, self._first = source.steps, int(led)
        self._source, self._num_classes, self._seed = source, num_classes, seed
        self._kinds = [(kind, alpha) for kind, alpha in ((mix_up, mixup), (cut_mix, cutmix)) if alpha > 0]

    def train(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for step, (images, labels) in enumerate(self._source.train(epoch, first), first):
            random = np.random.default_rng((self._seed, epoch, step))
            kind, alpha = self._kinds[random.integers(len(self._kinds))]
            images, share = kind(images, float(random.beta(alpha, alpha)), random)
            labels = probabilities(labels, share, self._num_classes)
            yield images[self._first :], labels[self._first :]

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._source.test()

    def state_dict(self) -> dict[str, Tensor]:
        return self._source.state_dict()

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._source.load_state_dict(state)


def mix_up(images: Tensor, share: float, random: np.random.Generator) -> tuple[Tensor, float]:
    """``share x_i + (1 - share) x_{i-1}`` for images (B, C, H, W), and ``share``."""
    return images.mul(share).add_(images.roll(1, 0), alpha=1 - share), share


def cut_mix(images: Tensor, share: float, random: np.random.Generator) -> tuple[Tensor, float]:
    """Images (B, C, H, W) with a rectangle of their neighbours', and the share of the area that is their own.

    The rectangle has the image's proportions and, before it is cut at the edges, 1 - ``share`` of its area; its centre
    is drawn anywhere.
    """
    height, width = images.shape[-2:]
    side = math.sqrt(1 - share)
    rows = _span(height, side, random)
    columns = _span(width, side, random)
    mixed = images.clone()
    mixed[:, :, rows, columns] = images.roll(1, 0)[:, :, rows, columns]
    return mixed, 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / (height * width)


def _span(size: int, side: float, random: np.random.Generator) -> slice:
    half = int(size * side) // 2
    centre = int(random.integers(size))
    return slice(max(0, centre - half), min(size, centre + half))


def probabilities(labels: Tensor, share: float, num_classes: int) -> Tensor:
    """Class probabilities (B, num_classes) fp32 of mixtures of labels (B,) with their neighbours'."""
    own = (labels[:, None] == torch.arange(num_classes, device=labels.device)).float()
    return own.mul(share).add_(own.roll(1, 0), alpha=1 - share)

"""Supervised contrast: features that are alike within a class."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..nn import gathered
from ..ops import labels
from ..ops.supervised_contrast import supervised_contrast
from .base import Task
from .classification import check_indices, classes_of

_NAME = "the supervised contrastive loss"


class SupervisedContrast(Task):
    """``supervised_contrast(output, y)`` of an output ``(N, features)``: what InfoPro's contrastive heads learn.

    It is a task for heads only, never for a whole network. Nothing is counted. Replicas compare the samples of their
    own part of a batch, unless ``LocalStep(gather_features=True)`` gathers the outputs of all.

    Args:
        features: outputs of a head per sample.
        classes: the network's task, a :class:`Classification` without label smoothing.
        temperature: t.
        mean_over: the loss is the mean over the ``"anchors"``, the samples that have another one of their class, or
            over the ``"batch"``, in which other samples count as 0. Samples of the ignored label are in neither.

    Raises:
        ValueError: for another task or ``mean_over``, a ``temperature`` that is not positive, and for label smoothing,
            which has no meaning in this loss.
    """

    compares_samples = True

    def __init__(
        self,
        features: int,
        classes: Task,
        temperature: float = 0.07,
        mean_over: Literal["anchors", "batch"] = "anchors",
    ) -> None:
        super().__init__(features)
        known = classes_of(classes, _NAME)
        if known.label_smoothing:
            raise ValueError(
                f"{_NAME} cannot smooth labels (label_smoothing={known.label_smoothing}): it asks which samples are of "
                'one class. Leave label_smoothing out, or take loss="softmax"'
            )
        if mean_over not in ("anchors", "batch"):
            raise ValueError(f"mean_over is 'anchors' or 'batch'; got {mean_over!r}")
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite; got {temperature!r}")
        self.temperature = temperature
        self.mean_over = mean_over
        self._classes = (known.num_classes, known.ignore_index)

    def check_form(self, target: Tensor, samples: int) -> None:
        check_indices(target, _NAME)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        num_classes, ignore_index = self._classes
        output, target = gathered(output, target)
        target = labels.ignoring_bad_labels(target, num_classes, ignore_index)
        loss = supervised_contrast(output, target, self.temperature, ignore_index)
        if self.mean_over == "anchors":
            return loss
        return loss * _share_of_anchors(target, ignore_index, loss.dtype)

    def example(self, samples: int, device: torch.device | None = None) -> Tensor:
        return torch.zeros(samples, dtype=torch.int64, device=device)


def _share_of_anchors(target: Tensor, ignore_index: int, dtype: torch.dtype) -> Tensor:
    """How large a share of the samples has another one of its class; the ignored label is left out of both."""
    ordered = target.sort().values
    equal = (ordered[1:] == ordered[:-1]).to(torch.int64)
    counted = ordered != ignore_index
    anchors = (F.pad(equal, (0, 1)) + F.pad(equal, (1, 0)) > 0) & counted
    return anchors.sum(dtype=dtype) / counted.sum(dtype=dtype).clamp(min=1)

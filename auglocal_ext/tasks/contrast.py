"""Supervised contrast: features that are alike within a class."""

from __future__ import annotations

import torch
from torch import Tensor

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

    Raises:
        ValueError: for another task, and for label smoothing, which has no meaning in this loss.
    """

    compares_samples = True

    def __init__(self, features: int, classes: Task, temperature: float = 0.07) -> None:
        super().__init__(features)
        known = classes_of(classes, _NAME)
        if known.label_smoothing:
            raise ValueError(
                f"{_NAME} cannot smooth labels (label_smoothing={known.label_smoothing}): it asks which samples are of "
                'one class. Leave label_smoothing out, or take loss="softmax"'
            )
        self.temperature = temperature
        self._classes = (known.num_classes, known.ignore_index)

    def check_form(self, target: Tensor, samples: int) -> None:
        check_indices(target, _NAME)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        num_classes, ignore_index = self._classes
        output, target = gathered(output, target)
        target = labels.ignoring_bad_labels(target, num_classes, ignore_index)
        return supervised_contrast(output, target, self.temperature, ignore_index)

    def example(self, samples: int, device: torch.device | None = None) -> Tensor:
        return torch.zeros(samples, dtype=torch.int64, device=device)

"""Classification: one class of several, by its number or as probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers.features import Features
from ..ops import labels
from ..ops.pooled_cross_entropy import pooled_cross_entropy
from .base import Scored, Task, check_samples, wide

_SUM_TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class Classification(Task):
    """``CE(output, y)``: the cross-entropy of ``(N, num_classes)`` logits; top-1 hits are counted.

    Targets are class indices ``(N,)``, int64, or class probabilities ``(N, num_classes)``, floating point, as mixup and
    CutMix make them. It is a hit if the largest logit is at the label, or at the largest
    probability.

    Args:
        num_classes: K, at least 2.
        label_smoothing: in [0, 1], as in ``F.cross_entropy``.
        ignore_index: label that counts nowhere. Class probabilities have none.

    Raises:
        ValueError: for an option out of range.
    """

    metric = "accuracy"

    def __init__(self, num_classes: int, *, label_smoothing: float = 0.0, ignore_index: int = -100) -> None:
        super().__init__(num_classes)
        check_options(
            self.outputs,
            label_smoothing,
            ignore_index,
            "for yes-or-no labels use task=Binary(), for one number task=Regression(1)",
        )
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index

    @property
    def num_classes(self) -> int:
        """K."""
        return self.outputs

    @property
    def expected_output(self) -> str:
        return f"(N, num_classes) = (N, {self.outputs}); the last child must be the classifier (pool, flatten, linear)"

    def check_form(self, target: Tensor, samples: int) -> None:
        check_samples(target, samples)
        if target.dtype == torch.int64 and target.dim() == 1:
            return
        if target.dtype in _SUM_TOLERANCE and tuple(target.shape[1:]) == (self.outputs,):
            return
        forms = (
            f"class indices ({samples},), int64, or class probabilities ({samples}, {self.outputs}) in float16 to "
            "float64"
        )
        found = f"got {tuple(target.shape)} in {target.dtype}"
        if target.is_floating_point() and target.dim() == 1:
            hint = "numbers to be predicted are task=Regression(...), yes-or-no labels task=Binary()"
            raise TypeError(f"expected {forms}; {found}: {hint}")
        if target.dtype == torch.int64 or target.dtype in _SUM_TOLERANCE:
            one_hot = tuple(target.shape[1:]) == (self.outputs,)
            hint = "one-hot rows are probabilities once .float()" if one_hot else "pass one class per sample"
            raise ValueError(f"expected {forms}; {found}: {hint}")
        hint = "convert class indices with target.long()" if target.dim() == 1 else "pass one class per sample"
        if target.is_floating_point():
            hint = "convert them with target.float()"
        raise TypeError(f"expected {forms}; {found}: {hint}")

    def invalid(self, target: Tensor) -> Tensor:
        if target.dtype == torch.int64:
            return labels.bad_labels(target, self.outputs, self.ignore_index)
        off = (target.sum(1) - 1).abs()
        return ~(off <= _SUM_TOLERANCE[target.dtype]) | (target < 0).any(1)  # written so that NaN is not valid

    def complaint(self, target: Tensor, invalid: Tensor) -> str:
        if target.dtype == torch.int64:
            return labels.first_bad(target, self.outputs, self.ignore_index, invalid)
        index = int(invalid.nonzero()[0])
        row = target[index]
        return (
            f"row {index} holds no class probabilities: the smallest is {float(row.min()):g} and their sum "
            f"{float(row.sum()):g}, expected none below 0 and a sum of 1; {int(invalid.sum())} of {len(target)} rows "
            "are wrong. For labels that do not exclude each other use task=MultiLabel(...)"
        )

    def late_complaint(self, count: int) -> str:
        return (
            f"{count} targets of earlier batches were not valid: expected "
            f"{labels.expected(self.outputs, self.ignore_index)}, or class probabilities that sum to 1. They were "
            "treated as ignored. Check num_classes and the data set's numbering; checking one batch on the CPU names "
            "the target"
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        output = wide(output)
        if target.dtype == torch.int64:
            target = labels.ignoring_bad_labels(target, self.outputs, self.ignore_index)
            return F.cross_entropy(output, target, ignore_index=self.ignore_index, label_smoothing=self.label_smoothing)
        if not target.is_cuda:
            return F.cross_entropy(output, target.to(output.dtype), label_smoothing=self.label_smoothing)
        return self._of_valid_rows(output, target)

    def _of_valid_rows(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean loss where rows that are not valid, of which the host hears later, count as 0."""
        invalid = self.invalid(target)
        target = target.masked_fill(invalid[:, None], 0).to(output.dtype)
        losses = F.cross_entropy(output, target, label_smoothing=self.label_smoothing, reduction="none")
        return losses.masked_fill(invalid, 0).mean()

    def count(self, output: Tensor, target: Tensor) -> Tensor:
        found = output.argmax(1)
        if target.dtype == torch.int64:
            return ((found == target) & (target != self.ignore_index)).sum()
        return (found == target.argmax(1)).sum()

    def counted(self, target: Tensor) -> Tensor | int:
        return (target != self.ignore_index).sum() if target.dtype == torch.int64 else len(target)

    def readout_score(self, x: Tensor, features: Features, linear: nn.Linear, target: Tensor) -> Scored:
        if target.dtype != torch.int64 or not self._is_plain:
            return super().readout_score(x, features, linear, target)
        return Scored(
            *pooled_cross_entropy(
                features.seen(x),
                linear.weight,
                linear.bias,
                target,
                ignore_index=self.ignore_index,
                label_smoothing=self.label_smoothing,
                check_labels=False,
            )
        )

    @property
    def _is_plain(self) -> bool:
        """Whether output, loss and count are this class's own, which the fused op computes, and not a subclass's."""
        own = ("readout", "score", "loss", "count")
        return all(getattr(type(self), name) is getattr(Classification, name) for name in own)

    def example(self, samples: int, device: torch.device | None = None) -> Tensor:
        return torch.zeros(samples, dtype=torch.int64, device=device)

    def extra_repr(self) -> str:
        return f"num_classes={self.outputs}, label_smoothing={self.label_smoothing}, ignore_index={self.ignore_index}"


def check_options(num_classes: int, label_smoothing: float, ignore_index: int, of_one_class: str) -> None:
    """ValueError for options of a cross-entropy that cannot be; ``of_one_class`` is what to do instead of one class."""
    if num_classes < 2:
        raise ValueError(f"cross-entropy over one class is 0 whatever the network does; {of_one_class}")
    if not isinstance(label_smoothing, int | float) or not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be within 0 .. 1, got {label_smoothing!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise ValueError(f"ignore_index must be an integer, got {ignore_index!r}; without an ignored label take -100")


def classes_of(task: Task, who: str) -> Classification:
    """The task as a :class:`Classification`, for losses that compare samples by class; ValueError for another."""
    if not isinstance(task, Classification):
        raise ValueError(f"{who} compares samples by class and needs task=Classification(...), got {task}")
    return task


def check_indices(target: Tensor, who: str) -> None:
    """TypeError unless targets that have the form of a classification's are class indices."""
    if target.dtype != torch.int64:
        raise TypeError(
            f"{who} compares samples by class and needs class indices (N,), int64; got class probabilities "
            f"{tuple(target.shape)}. Leave mixup and CutMix out, or choose another rule"
        )

"""Yes-or-no labels: one per sample, or several that do not exclude each other."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Task, check_samples, wide


class MultiLabel(Task):
    """``mean BCE(sigmoid(output), y)`` over ``num_labels`` labels that do not exclude each other.

    Targets are ``(N, num_labels)``: bool, integers 0 and 1, or probabilities in [0, 1]. The metric is the share
    of correct labels, the logit's sign against ``y > 0.5``.

    Args:
        num_labels: L, at least 1.
    """

    metric = "accuracy"

    def __init__(self, num_labels: int) -> None:
        super().__init__(num_labels)

    def check_form(self, target: Tensor, samples: int) -> None:
        check_samples(target, samples)
        if target.is_complex():
            raise TypeError(f"expected labels of 0 and 1, or probabilities; got {target.dtype}")
        if tuple(target.shape) != (samples, self.outputs):
            raise ValueError(
                f"expected targets ({samples}, {self.outputs}), one of 0 and 1 for each label; got "
                f"{tuple(target.shape)}"
            )

    def invalid(self, target: Tensor) -> Tensor:
        if target.is_floating_point():
            return ~((target >= 0) & (target <= 1))  # written so that NaN is not valid
        return (target != 0) & (target != 1)

    def complaint(self, target: Tensor, invalid: Tensor) -> str:
        index = tuple(invalid.nonzero()[0].tolist())
        return (
            f"the target at {index} is {target[index].item()}: expected 0 and 1, or probabilities between; "
            f"{int(invalid.sum())} of {target.numel()} are wrong"
        )

    def late_complaint(self, count: int) -> str:
        return (
            f"{count} targets of earlier batches were outside 0 .. 1, and were clamped; checking one batch on the CPU "
            "names them"
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        output = wide(output)
        target = target.to(output.dtype).reshape(output.shape)
        if target.is_cuda:  # values that are not valid, of which the host hears later
            target = target.nan_to_num(0.0).clamp(0, 1)
        return F.binary_cross_entropy_with_logits(output, target)

    def count(self, output: Tensor, target: Tensor) -> Tensor:
        return ((output > 0) == (target.reshape(output.shape) > 0.5)).sum()

    def counted(self, target: Tensor) -> int:
        return target.numel()

    def example(self, samples: int, device: torch.device | None = None) -> Tensor:
        return torch.zeros(samples, self.outputs, device=device)


class Binary(MultiLabel):
    """One yes-or-no label per sample: :class:`MultiLabel` with one label, whose targets may also be ``(N,)``."""

    def __init__(self) -> None:
        super().__init__(1)

    def check_form(self, target: Tensor, samples: int) -> None:
        check_samples(target, samples)
        super().check_form(target[:, None] if target.dim() == 1 else target, samples)

    def example(self, samples: int, device: torch.device | None = None) -> Tensor:
        return torch.zeros(samples, device=device)

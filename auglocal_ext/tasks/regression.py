"""Regression: numbers to be predicted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from .base import Task, check_samples, wide

RegressionLoss = Literal["mse", "l1", "huber"]
_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}


class Regression(Task):
    """``mean loss(output, y)`` over ``outputs`` numbers per sample; the metric is the mean absolute error.

    Targets are ``(N, outputs)``, or ``(N,)`` for one output, floating point and finite. They are not rescaled:
    standardise them yourself, and multiply the error by the factor you divided by.

    Args:
        outputs: numbers per sample, at least 1.
        loss: ``"mse"``, ``"l1"`` or ``"huber"`` (quadratic within 1).
    """

    metric = "mean absolute error"

    def __init__(self, outputs: int = 1, loss: RegressionLoss = "mse") -> None:
        super().__init__(outputs)
        if loss not in get_args(RegressionLoss):
            raise ValueError(f"loss is one of {', '.join(get_args(RegressionLoss))}; got {loss!r}")
        self.kind = loss

    def check_form(self, target: Tensor, samples: int) -> None:
        check_samples(target, samples)
        if not target.is_floating_point():
            raise TypeError(f"expected floating-point targets, got {target.dtype}; convert them with target.float()")
        shapes = [(samples, self.outputs), *([(samples,)] if self.outputs == 1 else [])]
        if tuple(target.shape) not in shapes:
            raise ValueError(f"expected targets {' or '.join(map(str, shapes))}, got {tuple(target.shape)}")

    def invalid(self, target: Tensor) -> Tensor:
        return ~target.isfinite()

    def complaint(self, target: Tensor, invalid: Tensor) -> str:
        index = tuple(invalid.nonzero()[0].tolist())
        return (
            f"the target at {index} is {target[index].item()}, expected finite numbers; "
            f"{int(invalid.sum())} of {target.numel()} are not"
        )

    def late_complaint(self, count: int) -> str:
        return (
            f"{count} targets of earlier batches were not finite, and counted as met; checking one batch on the CPU "
            "names them"
        )

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        output = wide(output)
        return _LOSSES[self.kind](output, self._wanted(output, target))

    def count(self, output: Tensor, target: Tensor) -> Tensor:
        output = wide(output)
        return (output - self._wanted(output, target)).abs().sum()

    def _wanted(self, output: Tensor, target: Tensor) -> Tensor:
        """Targets in the output's shape and dtype; on CUDA the output itself where they are not finite.

        Of those the host hears later, and until then they must not spoil the weights.
        """
        target = target.to(output.dtype).reshape(output.shape)
        return target if not target.is_cuda else _met_where_not_finite(output, target)

    def counted(self, target: Tensor) -> int:
        return target.numel()

    def example(self, samples: int, device: torch.device | None = None) -> Tensor:
        return torch.zeros(samples, self.outputs, device=device)

    def extra_repr(self) -> str:
        return f"outputs={self.outputs}, loss={self.kind!r}"


def _met_where_not_finite(output: Tensor, target: Tensor) -> Tensor:
    return torch.where(target.isfinite(), target, output.detach())

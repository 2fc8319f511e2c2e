"""Any callable as the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .base import Task, check_samples


class Criterion(Task):
    """``criterion(output, target)``: any callable that makes a scalar of an output ``(N, outputs)`` and targets.

    Nothing is counted. Only the number of samples in the targets is checked; the rest is up to the criterion. It runs
    once per local module, so it must not keep state between calls.

    Args:
        criterion: such as ``nn.HuberLoss()`` or a function; an ``nn.Module`` moves with the network, without trainable
            parameters.
        outputs: outputs of a head per sample.
        example: targets of one sample ``(1, ...)`` or more, whose shape and dtype are used to predict memory and cost;
            default ``(1, outputs)``, floating point.

    Raises:
        TypeError: if the criterion cannot be called, or is a class.
        ValueError: for a criterion with trainable parameters: all local losses would train them.
    """

    def __init__(
        self, criterion: Callable[[Tensor, Tensor], Tensor], outputs: int, example: Tensor | None = None
    ) -> None:
        super().__init__(outputs)
        if not callable(criterion) or isinstance(criterion, type):
            hint = f"; make one, {criterion.__name__}(...)" if isinstance(criterion, type) else ""
            raise TypeError(f"criterion must be callable as criterion(output, target), got {criterion!r}{hint}")
        if isinstance(criterion, nn.Module) and any(p.requires_grad for p in criterion.parameters()):
            raise ValueError(
                f"{type(criterion).__name__} has trainable parameters, which every local module's loss would train; "
                "freeze them with requires_grad_(False), or make them part of the network"
            )
        self.criterion = criterion
        self.example_said = example is not None
        self._form = ((outputs,), None) if example is None else (tuple(example.shape[1:]), example.dtype)

    def check_form(self, target: Tensor, samples: int) -> None:
        check_samples(target, samples)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        loss = self.criterion(output, target)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f'criterion must return a scalar, such as with reduction="mean"; it returned {found}')
        return loss

    def example(self, samples: int, device: torch.device | None = None) -> Tensor:
        shape, dtype = self._form
        return torch.zeros(samples, *shape, dtype=dtype, device=device)

    def extra_repr(self) -> str:
        named = "" if isinstance(self.criterion, nn.Module) else f", criterion={self.criterion!r}"
        return f"outputs={self.outputs}{named}"

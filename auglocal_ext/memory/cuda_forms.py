"""Functions that a CPU runs in several operators and CUDA in one, in CUDA's form, for predictions on fake tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .._torch import FakeTensor


@contextmanager
def cuda_forms() -> Iterator[None]:
    """Within it ``F.rms_norm`` of fake CPU tensors keeps its input and one number per row, as CUDA's kernel does.

    On a CPU torch makes it of elementwise operators, which keep the normalised input as well, and in low precision a
    float32 copy of the input. Where CUDA does so too, for a weight of another dtype, nothing is changed.

    The function is replaced, because a mode would not reach what a backward pass computes again.
    """
    before = F.rms_norm
    F.rms_norm = _rms_norm_as(before)
    try:
        yield
    finally:
        F.rms_norm = before


def _rms_norm_as(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rms_norm(
        input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        if not isinstance(input, FakeTensor) or input.device.type != "cpu":
            return plain(input, normalized_shape, weight, eps)
        if torch.is_autocast_enabled("cpu"):  # on CUDA it runs in float32
            with torch.autocast("cpu", enabled=False):
                return rms_norm(input.float(), normalized_shape, None if weight is None else weight.float(), eps)
        if weight is not None and weight.dtype != input.dtype:
            return plain(input, normalized_shape, weight, eps)
        return _RMSNorm.apply(input, weight, len(normalized_shape))

    return rms_norm


class _RMSNorm(torch.autograd.Function):
    """Makes and keeps tensors of the right sizes; they have no values."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor | None, axes: int) -> Tensor:
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        ctx.save_for_backward(input, weight, input.new_empty(input.shape[:-axes], dtype=wide))
        return torch.empty_like(input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, _ = ctx.saved_tensors
        need_input, need_weight = ctx.needs_input_grad[:2]
        return (
            torch.empty_like(input) if need_input else None,
            torch.empty_like(weight) if need_weight else None,
            None,
        )

"""A batch such as a step is called with, without values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .._torch import DataDependentOutputException
from ..local_sequential import LocalSequential
from ..tasks import Criterion, Task


def empty_batch(net: LocalSequential, batch_size: int) -> tuple[Tensor, Tensor]:
    """A batch in the dtype of the parameters, or of integers, channels last where the weights are."""
    floating = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.get_default_dtype())
    dtype = floating if net.network.input_dtype is None else net.network.input_dtype
    x = torch.empty(batch_size, *net.network.input_shape, dtype=dtype)
    if channels_last(net) and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return x, net.task.example_for(net.network.described_input, batch_size)


def channels_last(net: LocalSequential) -> bool:
    """Whether the weights of convolutions are stored channels last."""
    maps = [p for p in net.primary.parameters() if p.dim() == 4]
    return any(p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous() for p in maps)


@contextmanager
def explained_targets(task: Task, y: Tensor, what: str) -> Iterator[None]:
    """Around a step on targets ``y`` of :func:`empty_batch`: a criterion may not take what was assumed of them.

    Args:
        what: is done by the step, for the message: ``"memory is planned"``.
    """
    try:
        yield
    except DataDependentOutputException:
        raise
    except Exception as error:
        if not isinstance(task, Criterion) or task.example_said:
            raise
        raise ValueError(
            f"{what} by a step on targets of shape {tuple(y.shape)} in {y.dtype}, which the criterion, or the network, "
            f"does not take: say what targets are like, task=Criterion(criterion, outputs={task.outputs}, "
            f"example=targets of one sample). It says: {error}"
        ) from error

"""Private parts of torch that benchmarks alone use. Those of the package are in ``auglocal_ext/_torch.py``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

#: ``unset_fake_temporarily()`` is a context in which tensors have values under a fake tensor mode, which it gives.
__all__ = ["fake_store", "sleep_on_device", "unset_fake_temporarily", "whole_step_compiles"]


def sleep_on_device(cycles: int) -> None:
    """Keep the current CUDA stream busy for so many cycles of its clock; nothing public takes a known time."""
    torch.cuda._sleep(cycles)


def fake_store() -> Any:
    """The store of the backend "fake", whose other processes do not exist; no public one gives it its world size."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()


@contextlib.contextmanager
def whole_step_compiles(budget: float | None) -> Iterator[None]:
    """``torch.compile`` takes a function with a backward pass in it, which is an error by default.

    Args:
        budget: torch's ``activation_memory_budget``; None for its default.
    """
    import torch._functorch.config

    budgets = {} if budget is None else {"activation_memory_budget": budget}
    with torch._dynamo.config.patch(trace_autograd_ops=True), torch._functorch.config.patch(budgets):
        yield

"""What a call of an op costs the host: operators that run, and Python that torch runs for custom ops, which is none."""

from __future__ import annotations

import importlib
import os
import sys
from collections import Counter
from typing import Any

import pytest
import test_kept_bytes
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from auglocal_ext import ops
from auglocal_ext.ops import registry


def _tokens(dtype: torch.dtype, provider: str) -> Tensor:
    x = torch.randn(4, 6, dtype=dtype).requires_grad_()
    target = torch.tensor([0, 1, 0, 2])
    return ops.linear_cross_entropy(x, torch.ones(3, 6, dtype=dtype), None, target, provider=provider).loss


CALLS = {**test_kept_bytes.CALLS, "linear_cross_entropy": _tokens}

#: Crossings into ops of this package, forward and backward.
CROSSINGS = {
    "batch_norm_act": ["batch_norm_act_forward_", "batch_norm_act_backward"],
    "batch_norm_act_max_pool": ["batch_norm_act_max_pool_forward_", "batch_norm_act_max_pool_backward"],
    "layer_norm": ["layer_norm_forward", "layer_norm_backward"],
    "pooled_cross_entropy": ["pooled_cross_entropy"],
    "reconstruction_loss": ["reconstruction_loss"],
    "similarity_loss": ["similarity_loss", "similarity_loss_input_grad"],
    "supervised_contrast": ["supervised_contrast"],
    "linear_cross_entropy": ["linear_cross_entropy"],
}

#: What checks good labels.
LABELS = ["aminmax", "_local_scalar_dense", "_local_scalar_dense"]
#: Operators of torch that run beside them in the forward pass.
OTHERS = {
    "layer_norm": ["detach"],  # of the sum, which is kept and returned
    "pooled_cross_entropy": LABELS,
    "similarity_loss": LABELS,
    "linear_cross_entropy": LABELS,
}


class Crossings(TorchDispatchMode):
    """Counts the operators that run, by name: those of this package and those of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.others: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        counter = self.found if function.namespace == "auglocal_ext" else self.others
        counter[str(function).split(".")[1]] += 1
        return function(*args, **(kwargs or {}))


def _step(op: str) -> Tensor:
    result = CALLS[op](torch.float32, "aten")
    result.sum().backward()
    return result.detach()


@pytest.mark.parametrize("op", CALLS)
def test_crossings_into_ops(op: str) -> None:
    with Crossings() as crossings:
        _step(op)
    assert crossings.found == Counter(CROSSINGS[op])


@pytest.mark.parametrize("op", CALLS)
def test_operators_of_torch_around_an_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Crossings] = []
    module = importlib.import_module(f"auglocal_ext.ops.{op}")
    name = next(name for name in ("updatable", "transforms_active", "refuse_transforms") if hasattr(module, name))
    first = getattr(module, name)

    def entering(*arguments: Any) -> Any:  # the first thing that a call does, after its tensors have been made
        found = first(*arguments)
        if not entered:
            entered.append(Crossings())
            entered[0].__enter__()
        return found

    monkeypatch.setattr(module, name, entering)
    try:
        CALLS[op](torch.float32, "aten")
    finally:
        entered[0].__exit__(None, None, None)
    assert entered[0].others == Counter(OTHERS.get(op, []))


@pytest.mark.parametrize("op", CALLS)
def test_torch_runs_no_python_for_the_autograd_of_a_custom_op(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.path.join(os.path.dirname(torch.__file__), "_library")
    calls = 0

    def count(frame, event, argument) -> None:
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(folder)

    def counted() -> tuple[int, Tensor]:
        nonlocal calls
        _step(op)
        calls = 0
        sys.setprofile(count)
        try:
            result = _step(op)
        finally:
            sys.setprofile(None)
        return calls, result

    none, mine = counted()
    monkeypatch.setattr(registry, "run", lambda overload, *inputs: overload(*inputs))
    some, theirs = counted()
    assert torch.equal(mine, theirs)
    # In the forward pass: backward may run in a thread of its own, which is not counted. Ops with compiled nodes do not
    # go through registry.run.
    assert none == 0 and (op in ("batch_norm_act", "batch_norm_act_max_pool", "layer_norm") or some > 0)

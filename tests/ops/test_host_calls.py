"""What a call of an op costs the host: crossings into ops, and Python that torch runs for custom ops, which is none."""

from __future__ import annotations

import os
import sys
from collections import Counter

import pytest
import torch
from test_kept_bytes import CALLS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from auglocal_ext.ops import registry

#: Crossings into ops of this package, forward and backward.
CROSSINGS = {
    "batch_norm_act": ["batch_norm_act_forward_", "batch_norm_act_backward"],
    "batch_norm_act_max_pool": [
        "batch_norm_factors_",
        *(f"batch_norm_act_max_pool_{name}" for name in ("apply", "reduce", "input_grad")),
    ],
    "pooled_cross_entropy": ["pooled_cross_entropy"],
    "reconstruction_loss": ["reconstruction_loss"],
    "similarity_loss": ["similarity_loss", "similarity_loss_input_grad"],
    "supervised_contrast": ["supervised_contrast"],
}


class Crossings(TorchDispatchMode):
    """Counts the ops of this package that run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "auglocal_ext":
            self.found[str(function).split(".")[1]] += 1
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
    # In the forward pass: backward may run in a thread of its own, which is not counted.
    assert none == 0 and (op == "batch_norm_act" or some > 0)

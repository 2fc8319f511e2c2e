"""Flags of the ops are True or False: anything else, which would count as one of them, is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from auglocal_ext import ops

_X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
_VECTORS = (torch.zeros(3), torch.ones(3), None, None)
_LABELS = torch.tensor([0, 1, 0, 1])
_INDICES = torch.zeros(4, 3, 3, 3, dtype=torch.uint8)

CALLS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "layer_norm": ("rms", lambda flag: ops.layer_norm(_X, torch.ones(5), rms=flag)),
    "batch_norm_act": ("training", lambda flag: ops.batch_norm_act(_X, None, None, *_VECTORS[:2], training=flag)),
    "batch_norm_factors": ("training", lambda flag: ops.batch_norm_factors(_X, *_VECTORS[:2], training=flag)),
    "batch_norm_act_input_grad": (
        "training",
        lambda flag: ops.batch_norm_act_input_grad(_X, _X, *_VECTORS, None, "relu", 0.0, *_VECTORS[:2], flag, False),
    ),
    "its need_residual": (
        "need_residual",
        lambda flag: ops.batch_norm_act_input_grad(_X, _X, *_VECTORS, None, "relu", 0.0, *_VECTORS[:2], True, flag),
    ),
    "batch_norm_act_max_pool": (
        "training",
        lambda flag: ops.batch_norm_act_max_pool(_X, None, None, *_VECTORS[:2], training=flag),
    ),
    "batch_norm_act_max_pool_input_grad": (
        "training",
        lambda flag: ops.batch_norm_act_max_pool_input_grad(
            _X[..., :3, :3], _INDICES + 4, _X, *_VECTORS, "relu", 0.0, *_VECTORS[:2], flag
        ),
    ),
    "linear_cross_entropy": (
        "check_labels",
        lambda flag: ops.linear_cross_entropy(_X[..., 0, 0], torch.eye(3), None, _LABELS, check_labels=flag).loss,
    ),
    "pooled_cross_entropy": (
        "check_labels",
        lambda flag: ops.pooled_cross_entropy(_X, torch.eye(3), None, _LABELS, check_labels=flag).loss,
    ),
    "similarity_loss": ("check_labels", lambda flag: ops.similarity_loss(_X, _LABELS, 2, check_labels=flag)),
}


@pytest.mark.parametrize("call", CALLS)
def test_only_true_and_false(call: str) -> None:
    name, run = CALLS[call]
    for flag in (True, False):
        run(flag)
    for wrong in ("no", None, 1, torch.tensor(True)):
        with pytest.raises(TypeError, match=f"expected {name} as True or False, got .* of type {type(wrong).__name__}"):
            run(wrong)


def test_a_flag_that_is_compiled() -> None:
    compiled = torch.compile(lambda x, rms: ops.layer_norm(x, rms=rms), backend="eager", fullgraph=True)
    for rms in (True, False):
        torch.testing.assert_close(compiled(_X, rms), ops.layer_norm(_X, rms=rms))

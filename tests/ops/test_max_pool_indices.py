"""Indices that no forward pass made: the passes of batch_norm_act_max_pool read x where they say."""

from __future__ import annotations

import importlib
from typing import Any

import column
import pytest
import torch
from torch import Tensor

from auglocal_ext.ops import (
    batch_norm_act_max_pool_apply,
    batch_norm_act_max_pool_input_grad,
    batch_norm_act_max_pool_reduce,
)


def passes(x: Tensor, grad: Tensor, indices: Tensor, provider: str | None = None, **window: Any) -> list[Tensor]:
    """Sums and the gradient of x, in training."""
    mean, rstd, weight, bias = torch.zeros(4), torch.ones(4), torch.full((4,), 0.5), torch.full((4,), 3.0)
    arguments, options = (grad, indices, x, mean, rstd, weight, bias), {"provider": provider, **window}
    sums = batch_norm_act_max_pool_reduce(*arguments, **options)
    return [*sums, batch_norm_act_max_pool_input_grad(*arguments, "relu", 0.01, *sums, True, **options)]


def case(**window: Any) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 4, 6, 7, generator=torch.Generator().manual_seed(1)) + 1
    ones = torch.ones(4)
    y, indices = batch_norm_act_max_pool_apply(x, 0 * ones, ones, 0.5 * ones, 3 * ones, **window)
    return x, torch.randn(y.shape, generator=torch.Generator().manual_seed(2)), indices


@pytest.mark.parametrize(
    ("at", "index"),
    [((1, 2, 1, 1), 9), ((0, 3, 2, 2), 255), ((0, 0, 0, 1), 1), ((1, 0, 1, 0), 3), ((0, 1, 2, 3), 8)],
    ids=["beyond the window", "far beyond it", "above the map", "left of it", "right of it"],
)
def test_indices_that_name_no_element_are_refused(at: tuple[int, ...], index: int) -> None:
    x, grad, indices = case()
    indices[at] = index
    with pytest.raises(ValueError, match=rf"index {index} at \({', '.join(map(str, at))}\) names no element of x"):
        batch_norm_act_max_pool_reduce(grad, indices, x, *torch.ones(2, 4), None, None)
    with pytest.raises(ValueError, match="expected those that batch_norm_act_max_pool_apply returned"):
        batch_norm_act_max_pool_input_grad(
            *(grad, indices, x, *torch.ones(2, 4), None, None, "relu", 0.01, None, None, False)
        )


@pytest.mark.parametrize(
    "window", [{}, {"kernel_size": (1, 256), "padding": (0, 128)}, {"kernel_size": 2, "padding": 0}], ids=str
)
def test_those_of_the_forward_pass_are_taken_as_they_are(window: dict[str, Any]) -> None:
    x, grad, indices = case(**window)
    vectors = torch.zeros(4), torch.ones(4), torch.full((4,), 0.5), torch.full((4,), 3.0)
    size = [window.get(name, default) for name, default in (("kernel_size", 3), ("stride", 2), ("padding", 1))]
    six = [each for value in size for each in (value if isinstance(value, tuple) else (value, value))]
    direct = column.op("batch_norm_act_max_pool_reduce", "reference")(grad, indices, x, *vectors, 0.0, *six)
    for found, expected in zip(passes(x, grad, indices, **window), direct, strict=False):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("provider", ["reference", "cpu", "triton"])
def test_where_the_host_cannot_look_they_count_as_gradients_of_0(
    provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where the error comes in a later call; nothing beside x is read."""
    x, grad, indices = case()
    wrong, without = indices.clone(), grad.clone()
    for at, index in (((1, 2, 1, 1), 9), ((0, 3, 2, 2), 255), ((0, 0, 0, 1), 1), ((0, 1, 2, 3), 8)):
        wrong[at], without[at] = index, 0
    monkeypatch.setattr(
        importlib.import_module("auglocal_ext.ops.batch_norm_act_max_pool"), "check_values", lambda *_: None
    )
    for found, expected in zip(passes(x, grad, wrong, provider), passes(x, without, indices, "reference"), strict=True):
        torch.testing.assert_close(found, expected)

"""Which cases of the ops' tests run: each where its provider can be had, and of products of parameters every pair."""

from __future__ import annotations

from pathlib import Path

import column
import pytest
import torch

from auglocal_ext.ops import providers

HERE = Path(__file__).resolve().parent


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out cases that no run like this can have, and marks as slow what no pair of parameters needs."""
    mine = [item for item in items if item.path.is_relative_to(HERE) and "provider" in parameters(item)]
    listed = config.option.collectonly  # also what a machine with a GPU would run
    impossible = {item for item in mine if not possible(item, any_device=listed)}
    # Kernels of torch, which its own tests check: pairs are enough, and in the slow run.
    by_torch = {item for item in mine if parameters(item)["provider"] == "aten"}
    impossible |= {item for item in by_torch if not needed_for_pairs(item)}
    if impossible:
        config.hook.pytest_deselected(items=list(impossible))
        items[:] = [item for item in items if item not in impossible]
    for item in mine:
        if item in by_torch or not needed_for_pairs(item):
            item.add_marker("slow")


def parameters(item: pytest.Item) -> dict[str, object]:
    return getattr(getattr(item, "callspec", None), "params", {})


def possible(item: pytest.Item, any_device: bool) -> bool:
    """Whether the case is one of this machine's devices and of this run, and its dtype one of the provider's."""
    given = parameters(item)
    device, provider = given.get("device", "cpu"), given["provider"]
    if device == "cuda" and not any_device and not torch.cuda.is_available():
        return False
    if device == "cpu" and provider == "triton" and not providers.interpreted():
        return False  # test_without_gpu.py runs it
    row = providers.TABLES[item.module.OP].row(provider) if hasattr(item.module, "OP") else None
    if row is not None and provider == "aten" and not row.serves(device):
        return False
    return row is None or "dtype" not in given or given["dtype"] in row.dtypes


def needed_for_pairs(item: pytest.Item) -> bool:
    """Half of a product of three or more axes has every pair of their values: the white squares of a chessboard."""
    given, axes = parameters(item), []
    for mark in item.iter_markers("parametrize"):
        names, values = mark.args[:2]
        names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
        sets = [value.values if hasattr(value, "marks") else [value] if len(names) == 1 else value for value in values]
        wanted = [given[name] for name in names]
        (place,) = [i for i, found in enumerate(sets) if all(a is b for a, b in zip(found, wanted, strict=True))]
        if len(values) > 1 or "provider" in names:
            axes.append(place)
    return len(axes) < 3 or sum(axes) % 2 == 0


@pytest.fixture(autouse=True)
def _needed(request: pytest.FixtureRequest) -> None:
    given = parameters(request.node)
    if "provider" in given:
        column.need(given.get("device", "cpu"), given["provider"])

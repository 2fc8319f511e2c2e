"""Lists of parameters, of names with parameters, or of parameter groups, as optimizers take them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn


def listed(params: Iterable[Any]) -> list[Any]:
    """Parameters or groups as lists, for a factory that is called more than once."""
    return [{**item, "params": _as_list(item["params"])} if isinstance(item, dict) else item for item in params]


def replaced(params: list[Any], swap: Callable[[Any], Any]) -> list[Any]:
    """Parameters, or groups of them, with ``swap(parameter)`` in the place of each."""

    def of(item: Any) -> Any:
        if isinstance(item, dict):
            group = item["params"]
            return {**item, "params": list(map(of, group)) if isinstance(group, list) else [of(group)]}
        return (item[0], swap(item[1])) if isinstance(item, tuple) else swap(item)

    return [of(item) for item in params]


def named_parameters(net: nn.Module, params: list[Any]) -> list[Any]:
    """``params`` with the network's parameters in the place of their names."""
    return replaced(params, lambda p: net.get_parameter(p) if isinstance(p, str) else p)


def held(params: list[Any], net: nn.Module, others: set[int]) -> list[Any]:
    """Parameters, or groups of them, without those of ``others``, by ``id``, which ``net`` does not hold.

    An optimizer takes a group of no parameters, but not a list of none: a process that trains nothing has such a group.
    """
    elsewhere = others.difference(id(p) for p in net.parameters() if not p.is_meta)
    kept = []
    for item in params:
        if isinstance(item, dict):
            group = item["params"]
            group = [group] if isinstance(group, Tensor) else list(group)
            kept.append({**item, "params": [p for p in group if id(_parameter(p)) not in elsewhere]})
        elif id(_parameter(item)) not in elsewhere:
            kept.append(item)
    return kept or [{"params": []}]


def _parameter(item: Any) -> Any:
    return item[1] if isinstance(item, tuple) else item  # (name, parameter)


def _as_list(params: Any) -> Any:
    return params if isinstance(params, Tensor) else list(params)

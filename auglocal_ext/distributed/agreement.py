"""Processes find out before the first batch whether they are about to train the same thing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

_Value = TypeVar("_Value")


class DisagreementError(RuntimeError):
    """Processes that are to train one network differ in something; raised in all of them."""


def everyone(value: _Value, group: Any) -> list[_Value]:
    """The value of each process, in order of rank; a collective call. ``group``: None for one process."""
    if group is None:
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def agree(facts: Mapping[str, Any], group: Any, whose: str = "replicas", among: Any = None) -> None:
    """Compare what each process of a group says; a collective call.

    Args:
        facts: plain values by name, such as options and versions.
        group: the process group.
        whose: what its processes are, for the message.
        among: a plain value; processes are compared with those that have the same.

    Raises:
        DisagreementError: naming what differs first, with both values and ranks. In all processes, so none waits.
    """
    firsts: dict[Any, tuple[int, dict[str, Any]]] = {}
    for rank, (kind, theirs) in enumerate(everyone((among, dict(facts)), group)):
        first_rank, first = firsts.setdefault(kind, (rank, theirs))
        for name in [*first, *(name for name in theirs if name not in first)]:
            here, there = first.get(name, "nothing"), theirs.get(name, "nothing")
            if here != there:
                raise DisagreementError(
                    f"{whose} {first_rank} and {rank} differ in {name}: {here} and {there}. Start every process with "
                    "the same code, network and options"
                )


def shapes_of(named: Iterable[tuple[str, Tensor]]) -> dict[str, str]:
    """For each tensor its name with its dtype, shape and whether it is trained, as :func:`agree` compares them."""
    return {
        name: f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)}{'' if t.requires_grad else ', frozen'}"
        for name, t in named
    }

"""What the processes of a step compare before they train, and what the first one finds for all."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from .._version import __version__
from ..distributed import everyone, shapes_of
from ..local_sequential import LocalSequential

_Found = TypeVar("_Found")


def told_by_first(find: Callable[[], _Found], group: Any) -> _Found:
    """What ``find()`` returns in the first process, in all of them; its error is raised in all of them too."""
    found: Any = None
    error: Exception | None = None
    if torch.distributed.get_rank(group) == 0:
        try:
            found = find()
        except Exception as failed:
            error = failed
    refused = isinstance(error, ValueError)
    said = None if error is None else str(error) if refused else f"{type(error).__name__}: {error}"
    (found, said, refused), *_ = everyone((found, said, refused), group)
    if said is not None:
        raise (ValueError(said) if refused else RuntimeError(f"in the first process: {said}")) from error
    return found


def facts_of(net: LocalSequential) -> dict[str, Any]:
    """Versions, rule, cuts, task, and the shape of every parameter and buffer."""
    return {
        "the version of auglocal_ext": __version__,
        "torch": torch.__version__,
        "the rule": repr(net.rule),
        "the cuts": [len(module.groups) for module in net.local_modules],
        "the task": repr(net.task),
        **shapes_of([*net.named_parameters(), *net.named_buffers()]),
    }


def checksum(net: LocalSequential) -> int:
    """Of all parameters and buffers that hold data, and of what gives the others theirs."""
    total = 0 if net.deferred is None else zlib.crc32(repr(net.deferred.origin).encode())
    for name, tensor in net.state_dict().items():
        if tensor.is_meta:
            continue
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        total = zlib.crc32(data.tobytes(), zlib.crc32(name.encode(), total))
    return total


def options_of(optimizer: torch.optim.Optimizer) -> str:
    """Its class, and the options and number of parameters of each group."""
    groups = [{k: v for k, v in g.items() if k != "params"} | {"n": len(g["params"])} for g in optimizer.param_groups]
    return f"{type(optimizer).__name__} {groups}"

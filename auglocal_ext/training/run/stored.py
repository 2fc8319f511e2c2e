"""What a checkpoint must hold before anything of it is used: a file may be damaged, or made by something else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...distributed.checkpoint_files import reason
from ...nn import is_sharded
from ..errors import CheckpointError, TrainingError
from .measures import FORMS


def _count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _measure(value: Any) -> bool:
    """A perplexity may be infinite where its loss is not."""
    return value is None or value == math.inf or _number(value)


def _named(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def _settings(value: Any) -> bool:
    return _named(value) and "epochs" in value and all(map(_plain, value.values()))


def _plain(value: Any, depth: int = 10) -> bool:
    if _named(value):  # a rule as head, which may have another one as its own
        return depth > 0 and all(_plain(each, depth - 1) for each in value.values())
    if isinstance(value, list):
        return all(type(each) in (int, float) for each in value)
    return value is None or type(value) in (bool, int, float, str)


def _names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_count(size) and size for size in value)


def _window(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 1 and _count(value[0]) and value[0] > 0


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _sums(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.float64 and value.dim() == 1 and _finite(value)


def _states(value: Any) -> bool:
    states = value if isinstance(value, list) else [value]
    return bool(states) and all(_named(each) and each for each in states)


_KINDS: dict[Callable[[Any], bool], str] = {
    _count: "a whole number",
    _number: "a number",
    _measure: "a number or none",
    _named: "values by name",
    _settings: "settings",
    _names: "a list of names",
    _shape: "three sizes",
    _window: "a number of tokens",
    _text: "text",
    _sums: "finite sums",
    _states: "states of generators",
}

_PARTS: dict[str, Callable[[Any], bool]] = {
    "settings": _settings,
    "data": _named,
    "progress": _named,
    "progress.epochs": _count,
    "progress.best_epoch": _count,
    "progress.last_accuracy": _number,
    "progress.best_accuracy": _number,
    **{f"progress.{which}_{form.column}": _measure for form in FORMS[1:] for which in ("last", "best")},
    "progress.train_seconds": _number,
    "progress.waiting_seconds": _number,
    "epoch_sums": _named,
    "epoch_sums.steps": _count,
    "epoch_sums.images": _count,
    "epoch_sums.seconds": _number,
    "epoch_sums.waiting": _number,
    "epoch_sums.sums": _sums,
    "batches": _named,
    "random": _states,
}
_OF_IMAGES: dict[str, Callable[[Any], bool]] = {
    "data.classes": _names,
    "data.train_images": _count,
    "data.test_images": _count,
    "data.input_shape": _shape,
}
_OF_TEXT: dict[str, Callable[[Any], bool]] = {
    "data.vocabulary": _count,
    "data.train_tokens": _count,
    "data.test_tokens": _count,
    "data.input_shape": _window,
    "data.bytes_per_token": _number,
    "data.checksum": _text,
}
_OF_FILES: dict[str, Callable[[Any], bool]] = {"network": _named, "learner": _named, "learner.optimizer": _named}


def check(state: Mapping[str, Any], path: Path, *, file: bool) -> None:
    """CheckpointError unless ``state`` has the parts that a run saves.

    Args:
        file: whether it is that of a file, with network and optimizer, not that of a folder.
    """
    data = state.get("data")
    of_data = _OF_TEXT if isinstance(data, Mapping) and "vocabulary" in data else _OF_IMAGES
    for name, kind in {**_PARTS, **of_data, **(_OF_FILES if file else {})}.items():
        value: Any = state
        for key in name.split("."):
            value = value.get(key) if isinstance(value, Mapping) else None
        if not kind(value):
            came = "nothing" if value is None else f"{value!r:.60}"
            expected = f"expected {_KINDS[kind]} as {name}, found {came}"
            raise CheckpointError(f"{path}: not a readable checkpoint ({expected})")


@contextmanager
def taken_from(path: Path, what: str) -> Iterator[None]:
    """CheckpointError for whatever the block raises in taking ``what`` from the checkpoint."""
    try:
        yield
    except TrainingError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: its {what} cannot be used ({type(error).__name__}: {reason(error)})") from error


def check_network(path: Path, network: torch.nn.Module) -> None:
    """CheckpointError if a tensor that was loaded is not finite."""
    for name, value in network.state_dict().items():
        if not _finite(value):
            raise CheckpointError(f"{path}: {name} is not finite")


def check_tensors(path: Path, found: Mapping[str, Any], network: torch.nn.Module) -> None:
    """CheckpointError if ``found`` has no tensors of the network's dtypes: loading would convert others."""
    for name, own in network.state_dict().items():
        value = found.get(name, own)
        if not isinstance(value, Tensor) or value.dtype != own.dtype or value.layout != own.layout:
            came = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise CheckpointError(f"{path}: expected {name} as a tensor of {own.dtype}, found {came}")


def options(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """What the optimizer's arithmetic depends on, of each group; all but the rate, which is set for each epoch."""
    names = ("momentum", "dampening", "weight_decay", "nesterov", "maximize", "betas", "eps", "amsgrad")
    groups = optimizer.param_groups
    return [{name: _tupled(group[name]) for name in names if name in group} for group in groups]


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_BUFFERS = ("momentum_buffer", "exp_avg", "exp_avg_sq")
"""Of SGD and of AdamW, in the shape of their parameter."""


def check_optimizer(path: Path, optimizer: torch.optim.Optimizer, before: list[dict[str, Any]]) -> None:
    """CheckpointError if loading has changed the optimizer's options, or its state is not that of its parameters."""
    if options(optimizer) != before:
        raise CheckpointError(f"{path}: its optimizer has {options(optimizer)}, the settings make {before}")
    parameters = {p for group in optimizer.param_groups for p in group["params"]}
    for parameter, state in optimizer.state.items():
        buffers = [value for name, value in state.items() if name in _BUFFERS and value is not None]
        fits = parameter in parameters and all(
            isinstance(buffer, Tensor)
            and (buffer.shape, buffer.dtype) == (parameter.shape, parameter.dtype)
            and _finite(buffer)
            for buffer in buffers
        )
        if not fits:
            raise CheckpointError(f"{path}: the state of its optimizer is not that of the network's parameters")


def _finite(value: Tensor) -> bool:
    local: Tensor = value.to_local() if is_sharded(value) else value  # type: ignore[attr-defined]
    return local.is_meta or bool(torch.isfinite(local).all())

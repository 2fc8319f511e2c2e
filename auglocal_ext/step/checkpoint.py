"""What ``LocalStep`` saves, under names that do not depend on how the network is spread over processes.

A tensor of the network is ``network.NAME``, one of the optimizer's state ``optimizer.NAME.KEY`` with the name of its
parameter. Options of parameter groups are listed with the names of the parameters they hold for. ``in_flight.py`` has
what a run holds besides.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import CheckpointError, Stored, everyone, together, write
from ..local_sequential import LocalSequential
from ..nn import is_sharded
from ..ops import tuning
from . import in_flight
from .in_flight import Place

#: Of a parameter group, but about its parameters and not its options.
_MEMBERS = ("params", "param_names")
_Options = dict[str, Any]


def save(
    folder: str | os.PathLike[str],
    net: LocalSequential,
    optimizer: torch.optim.Optimizer,
    rest: Mapping[str, Any],
    where: Mapping[str, Any],
    place: Place,
    group: Any,
) -> None:
    """Write what the processes of ``group`` hold of a network and its optimizer's state.

    Args:
        rest: what else is saved, from the first process.
        where: what must be equal in all processes when they save, by name.
        place: of this process in a run over stages.
    """
    path = _path(folder)
    everywhere = everyone({**where, "the folder": str(folder)}, group)
    for rank, theirs in enumerate(everywhere):
        for name in theirs:
            if theirs[name] != everywhere[0][name]:
                raise CheckpointError(
                    f"ranks 0 and {rank} differ in {name}: {everywhere[0][name]} and {theirs[name]}. All processes "
                    "save together, after the same batch"
                )

    def collect() -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"network.{name}": tensor for name, tensor in _held(net).items()}
        state, values = _state(net, optimizer)
        tensors.update({_key(*at): tensor for at, tensor in state.items()})
        run, facts = in_flight.collect(place)
        ours = {"groups": _groups(net, optimizer), "tensors": list(state), "values": values, "run": facts}
        ours["providers"] = tuning.decided()
        return {**tensors, **run}, ours

    tensors, ours = together(collect, group)
    parts = everyone(ours, group)
    everything = {
        "facts": _facts(net, optimizer),
        "groups": _merged(row for part in parts for row in part["groups"]),
        "tensors": list(dict.fromkeys(at for part in parts for at in part["tensors"])),
        "values": {at: value for part in parts for at, value in part["values"].items()},
        "run": in_flight.merged([part["run"] for part in parts]),
        "providers": {form: name for part in parts for form, name in part["providers"].items()},
        **rest,
    }
    write(path, tensors, everything, group)


def load(
    folder: str | os.PathLike[str],
    net: LocalSequential,
    optimizer: torch.optim.Optimizer,
    place: Place,
    group: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read what this process holds of the network, in place, of the optimizer's state, and of the run, which goes on.

    Returns:
        The state for ``optimizer.load_state_dict``, and what else was saved.
    """
    stored = together(lambda: Stored(_path(folder)), group)
    members = everyone([name for _, names in _groups(net, optimizer) for name in names], group)
    if len(set(everyone(stored.tensors.name, group))) > 1:
        raise CheckpointError(f"{folder}: processes have found different checkpoints; name the same in all of them")

    def targets() -> tuple[dict[str, Tensor], dict[str, Any], in_flight.Resumed]:
        _compare(stored, net, optimizer, {name for names in members for name in names}, folder)
        tensors = {f"network.{name}": tensor for name, tensor in _held(net).items()}
        state, into = _targets(stored, net, optimizer)
        run = in_flight.targets(place, stored, folder)
        return {**tensors, **into, **run.tensors}, state, run

    tensors, state, run = together(targets, group)
    stored.read(tensors, group)
    run.apply()
    return state, stored.rest


def _path(folder: str | os.PathLike[str]) -> Path:
    return Path(os.path.abspath(folder))


def _key(name: str, key: str) -> str:
    return f"optimizer.{name}.{key}"


def _held(net: nn.Module) -> dict[str, Tensor]:
    """Tensors of the network's state dict that this process holds."""
    held = {}
    for name, tensor in net.state_dict().items():
        if not _can_be_held(tensor):
            raise CheckpointError(f"{name} is a {type(tensor).__name__}: checkpoints hold tensors alone")
        if not tensor.is_meta:
            held[name] = tensor
    return held


def _can_be_held(value: Any) -> bool:
    return type(value) in (Tensor, nn.Parameter) or is_sharded(value)


def _facts(net: LocalSequential, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """What a checkpoint must have in common with the step that loads it, as far as tensors do not show it."""
    options = {f"the rule's {each.name}": repr(getattr(net.rule, each.name)) for each in _fields(net.rule)}
    return {
        "the rule": type(net.rule).__name__,
        **options,
        "the task": repr(net.task),
        "the last layers of the local modules": str(net.network.ends),
        "the optimizer": type(optimizer).__name__,
    }


def _fields(rule: Any) -> tuple[Any, ...]:
    return dataclasses.fields(rule) if dataclasses.is_dataclass(rule) else ()


def _names(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """For each parameter group the names of its parameters."""
    named = {id(p): name for name, p in net.named_parameters()}
    return [[named[id(p)] for p in group["params"]] for group in optimizer.param_groups]


def _groups(net: nn.Module, optimizer: torch.optim.Optimizer) -> list[tuple[_Options, list[str]]]:
    """Options of each parameter group, and the names of its parameters."""
    return [
        ({key: value for key, value in group.items() if key not in _MEMBERS}, names)
        for group, names in zip(optimizer.param_groups, _names(net, optimizer), strict=True)
        if names
    ]


def _merged(rows: Iterable[tuple[_Options, list[str]]]) -> list[tuple[_Options, list[str]]]:
    """Rows of equal options as one; a parameter that several processes train is named once."""
    merged: dict[str, tuple[_Options, dict[str, None]]] = {}
    for options, names in rows:
        merged.setdefault(_text(options), (options, {}))[1].update(dict.fromkeys(names))
    return [(options, list(names)) for options, names in merged.values()]


def _text(options: _Options) -> str:
    return repr(sorted((k, v.tolist() if isinstance(v, Tensor) else v) for k, v in options.items()))


def _state(
    net: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[tuple[str, str], Tensor], dict[tuple[str, str], Any]]:
    """Tensors of the optimizer's state, and its other values, by the parameter's name and the state's key."""
    tensors, values = {}, {}
    for group, names in zip(optimizer.param_groups, _names(net, optimizer), strict=True):
        for parameter, name in zip(group["params"], names, strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if _can_be_held(value):
                    tensors[name, key] = value
                elif isinstance(value, Tensor):
                    raise CheckpointError(
                        f"the optimizer's {key} of {name} is a {type(value).__name__}, which checkpoints do not hold"
                    )
                else:
                    values[name, key] = value
    return tensors, values


def _compare(
    stored: Stored, net: LocalSequential, optimizer: torch.optim.Optimizer, trained: set[str], folder: Any
) -> None:
    """CheckpointError for a checkpoint of something else; the whole network is compared, whoever holds it."""
    theirs = stored.rest["facts"]
    for name, ours in _facts(net, optimizer).items():
        if theirs.get(name, ours) != ours:  # an older version did not have every option
            raise CheckpointError(
                f"{folder} does not fit: {name} of the checkpoint is {theirs[name]}, and here it is {ours}"
            )
    shapes = {f"network.{name}": tensor.shape for name, tensor in net.state_dict().items()}
    sizes = {name: size for name, (size, _) in stored.forms.items() if name.startswith("network.")}
    _same_names("tensors of the network", shapes, sizes, folder)
    for name, shape in shapes.items():
        if shape != sizes[name]:
            raise CheckpointError(
                f"{folder} does not fit: {name.removeprefix('network.')} has the shape {list(sizes[name])} in the "
                f"checkpoint and {list(shape)} here"
            )
    _same_names(
        "parameters of the optimizer", trained, {n for _, names in stored.rest["groups"] for n in names}, folder
    )
    if lost := [_key(*at) for at in stored.rest["tensors"] if _key(*at) not in stored.forms]:
        raise CheckpointError(f"{folder} is not complete: {lost[0]} is missing, and {len(lost) - 1} more")


def _same_names(what: str, ours: Iterable[str], theirs: Iterable[str], folder: Any) -> None:
    missing, strange = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    if missing or strange:
        found = [f"{_some(names)} {why}" for names, why in ((missing, "only here"), (strange, "only there")) if names]
        raise CheckpointError(f"{folder} does not fit, it has other {what}: {'; '.join(found)}")


def _some(names: list[str]) -> str:
    shown = ", ".join(name.removeprefix("network.") for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _targets(
    stored: Stored, net: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The state for ``optimizer.load_state_dict``, whose tensors are still to be read; and these by name."""
    into: dict[str, Tensor] = {}
    options_of = {name: options for options, names in stored.rest["groups"] for name in names}
    keys: dict[str, list[str]] = {}
    for name, key in stored.rest["tensors"]:
        keys.setdefault(name, []).append(key)
    values: dict[str, _Options] = {}
    for (name, key), value in stored.rest["values"].items():
        values.setdefault(name, {})[key] = value
    groups, state, index = [], {}, 0
    for group, names in zip(optimizer.param_groups, _names(net, optimizer), strict=True):
        options = {_text(options_of[name]): options_of[name] for name in names}
        if len(options) > 1:
            apart = [next(n for n in names if options_of[n] is found) for found in list(options.values())[:2]]
            raise CheckpointError(
                f"{' and '.join(apart)} are in one parameter group here, and had other options in the checkpoint: make "
                "the same groups"
            )
        # A group without parameters in this process keeps its options, which change nothing.
        chosen = next(iter(options.values()), {k: v for k, v in group.items() if k not in _MEMBERS})
        groups.append({**chosen, "params": list(range(index, index + len(names)))})
        for parameter, name in zip(group["params"], names, strict=True):
            if name in keys or name in values:
                state[index] = dict(values.get(name, {}))
                for key in keys.get(name, ()):
                    state[index][key] = into[_key(name, key)] = _empty(parameter, *stored.forms[_key(name, key)])
            index += 1
    return {"state": state, "param_groups": groups}, into


def _empty(parameter: Tensor, size: torch.Size, dtype: torch.dtype) -> Tensor:
    """Memory for a tensor of the state: laid out as its parameter where it has its shape; counters are on the CPU."""
    if size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    return torch.empty(size, dtype=dtype, device="cpu" if size == () else parameter.device)

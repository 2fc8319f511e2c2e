"""The checkpoint of a run folder: a file written by one process, or a folder written by several together.

Either form is read by one process and by any number of them. Writing one deletes the other, once it is complete; where
a crash has left both, the one that has come further counts.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from ... import distributed
from ...distributed.checkpoint_files import PARTIAL
from ...local_sequential import LocalSequential
from ...step import checkpoint as parts
from ...step.in_flight import Place
from ...step.in_flight import load_state_dict as load_followed
from ..config.train_config import from_dict
from ..errors import CheckpointError, OutputError, SettingsError
from . import checkpoint, stored
from .kind import RunTask
from .learner import Learner
from .learners import make_network
from .optimizers import make_optimizer, parameter_groups
from .processes import Alone
from .writing import to

FILE, FOLDER = "checkpoint.pt", "checkpoint"


def find(output: Path) -> Path | None:
    """The checkpoint in a run folder; None if there is none. CheckpointError if the folder cannot be read."""
    file, folder = output / FILE, output / FOLDER
    try:
        found = [path for path in (file, folder) if path.exists()]
    except OSError as error:
        raise CheckpointError(f"{output} cannot be read: {error.strerror}") from error
    if len(found) < 2:
        return found[0] if found else None
    return max((folder, file), key=lambda path: _how_far(read(path)))


def stamp(output: Path) -> tuple[Any, ...] | None:
    """What tells one checkpoint in a run folder from the next; None if there is none."""
    if (path := find(output)) is None:
        return None
    status = (path / "rest.pt" if path.is_dir() else path).stat()
    return path.name, status.st_ino, status.st_mtime_ns, status.st_size


def _how_far(state: dict[str, Any]) -> tuple[int, int]:
    return state["progress"]["epochs"], state["epoch_sums"]["steps"]


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, of a folder's all but the tensors of network and optimizer; CheckpointError if it is
    missing, damaged, or another version's.
    """
    if path.is_dir():
        try:
            state = distributed.Stored(path).rest.get("extra")
        except distributed.CheckpointError as error:
            raise CheckpointError(str(error)) from error
        checkpoint.check_format(state, path)
    else:
        state = checkpoint.load(path)
    stored.check(state, path, file=not path.is_dir())
    return state


def refuse_earlier_run(output: Path) -> None:
    """SettingsError if ``output`` holds a run, which a new one would overwrite."""
    if find(output) is not None:
        raise SettingsError(f"{output} holds a run: continue it with --resume, or choose another --output")


def save(output: Path, state: dict[str, Any], learner: Learner, team: Alone) -> Path:
    """Write a run's checkpoint: ``state`` and what the learner's processes hold. Collective; returns where."""
    file, folder = output / FILE, output / FOLDER
    if team.mesh is not None and isinstance(learner.network, LocalSequential):
        _written(folder, lambda: learner.save(folder, {"format": checkpoint.FORMAT, **state}))
        _written(file, lambda: team.on_first(lambda: file.unlink(missing_ok=True)))
        return folder

    def write() -> None:
        whole = {**state, "network": learner.network.state_dict(), "learner": learner.state_dict()}
        checkpoint.save(whole, file)
        with to(folder):
            if folder.exists():
                shutil.rmtree(folder)

    if team.size == 1:
        write()
    else:
        _written(file, lambda: team.on_first(write))
    return file


def load(path: Path, state: dict[str, Any], learner: Learner, team: Alone) -> None:
    """Read network and optimizer from the checkpoint that ``state`` is of; collective.

    Raises:
        CheckpointError: if it is not that of this network and optimizer. Both may be partly loaded then.
    """
    before = stored.options(learner.optimizer)
    with stored.taken_from(path, "network and optimizer"):
        if path.is_dir():
            _collective(lambda: learner.load(path))
        elif team.mesh is not None and isinstance(learner.network, LocalSequential):
            _load_converted(path, state, learner, team)
        else:
            stored.check_tensors(path, state["network"], learner.network)
            learner.network.load_state_dict(state["network"])
            if (state["learner"].get("grad_scaler") is None) != (learner.grad_scaler is None):
                raise CheckpointError(f"{path}: its loss scaler is not that of --amp")
            learner.load_state_dict(state["learner"])
        stored.check_network(path, learner.network)
        stored.check_optimizer(path, learner.optimizer, before)


def random_states(team: Alone) -> Any:
    """Of this process, or a list of those of all; collective."""
    states = team.everyone(checkpoint.random_state(team.device))
    return states if team.size > 1 else states[0]


def restore_random_states(states: Any, team: Alone) -> None:
    """The inverse of :func:`random_states`; as many processes as saved them take them up, others begin anew."""
    states = states if isinstance(states, list) else [states]
    if len(states) == team.size:
        checkpoint.restore_random_state(states[team.rank], team.device)


def load_network(path: Path, state: dict[str, Any], network: torch.nn.Module) -> None:
    """Read the weights alone from the checkpoint that ``state`` is of, in one process."""
    if path.is_dir():
        tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        _collective(lambda: distributed.Stored(path).read(tensors, None))
    else:
        stored.check_tensors(path, state["network"], network)
        network.load_state_dict(state["network"])
    stored.check_network(path, network)


def _load_converted(path: Path, state: dict[str, Any], learner: Learner, team: Alone) -> None:
    """As ``learner.load``, of one process's file; the folder made of it is gone afterwards, and ``path`` untouched."""
    folder = path.with_name(FOLDER + PARTIAL)
    task = cast("RunTask", cast("LocalSequential", learner.network).task)
    _collective(lambda: team.on_first(lambda: _convert(state, task, folder)))
    try:
        _collective(lambda: learner.load(folder))
        team.everyone(None)  # all have read it
    finally:
        if team.first:
            shutil.rmtree(folder, ignore_errors=True)


def _convert(state: dict[str, Any], task: RunTask, folder: Path) -> None:
    """The folder that several processes would have written in place of one process's file."""
    config = from_dict(state["settings"])
    facts, plain = state["data"], state["learner"]
    network = make_network(config, tuple(facts["input_shape"]), task, torch.device("cpu"))
    assert isinstance(network, LocalSequential)
    network.load_state_dict(state["network"])
    optimizer = make_optimizer(config, parameter_groups(config, network))
    optimizer.load_state_dict(plain["optimizer"])
    rest = {name: value for name, value in state.items() if name not in ("network", "learner")}
    saved = {"grad_scaler": plain["grad_scaler"], "providers": plain.get("providers") or {}, "extra": rest}
    place = Place(network.local_modules, None, (), 0, 1, torch.device("cpu"))
    load_followed(place, plain)
    parts.save(folder, network, optimizer, saved, {}, place, None)


def _written(path: Path, work: Callable[[], None]) -> None:
    """What the processes write together fails in all of them alike."""
    try:
        work()
    except distributed.CheckpointError as error:
        raise OutputError(f"{path} cannot be written: {error}") from error


def _collective(work: Callable[[], None]) -> None:
    """What the processes do together fails in all of them alike."""
    try:
        work()
    except distributed.CheckpointError as error:
        raise CheckpointError(str(error)) from error

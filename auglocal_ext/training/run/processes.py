"""The processes that torchrun has started for one run: which of them does what, and what they tell each other."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...distributed import everyone, together
from ..errors import SettingsError
from .metrics import EpochSums

_Value = TypeVar("_Value")


class Launch:
    """How this process was started: by torchrun, as one of several, or by itself.

    Attributes:
        rank, size: this process among all; 0 and 1 without torchrun.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._environment = environment
        self._started = "RANK" in environment and "WORLD_SIZE" in environment
        self.rank = int(environment["RANK"]) if self._started else 0
        self.size = int(environment["WORLD_SIZE"]) if self._started else 1
        self._store: Any = None  # of this attempt
        self._lasting: Any = None  # of all attempts

    def grid(self, stages: int | None, replicas: int | None, before: tuple[int, int] | None = None) -> tuple[int, int]:
        """Stages and replicas of all processes.

        What is not given follows from the other one; without both it is what the run had ``before``, if as many
        processes make that, else one stage of replicas.

        Raises:
            SettingsError: if there are more or fewer processes, with the command that starts the right number.
        """
        for flag, value in (("--stages", stages), ("--replicas", replicas)):
            if value is not None and value < 1:
                raise SettingsError(f"{flag} must be at least 1, got {value}")
        if stages is None and replicas is None and before is not None and before[0] * before[1] == self.size:
            return before
        if stages is None:
            stages = max(1, self.size // (replicas or self.size))
        if replicas is None:
            replicas = max(1, self.size // stages)
        if stages * replicas == self.size:
            return stages, replicas
        asked = f"--stages {stages} --replicas {replicas}"
        command = f"torchrun --nproc-per-node {stages * replicas} -m auglocal_ext train {asked} ..."
        has = f"torchrun has started {self.size}" if self._started else "this is one"
        raise SettingsError(f"{asked} is for {stages * replicas} processes and {has}; start them with: {command}")

    def device(self, name: str) -> torch.device:
        """This process's device: of several on CUDA each has the one of its number on its host."""
        own = int(self._environment.get("LOCAL_RANK", 0))
        kind, _, index = name.partition(":")
        if kind == "auto":
            kind = "cuda" if torch.cuda.is_available() else "cpu"
        if kind not in ("cpu", "cuda") or index:
            raise SettingsError(f"--device of several processes is auto, cpu or cuda, not {name!r}: each takes its own")
        if kind == "cpu":
            return torch.device("cpu")
        here, there = int(self._environment.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
        if here > there:
            raise SettingsError(
                f"torchrun has started {here} processes on this host, and torch sees {there} CUDA devices: start at "
                "most as many with --nproc-per-node, or choose --device cpu"
            )
        torch.cuda.set_device(own)
        return torch.device("cuda", own)

    def meet(self) -> None:
        """Connect to torchrun's store, through which processes tell each other about errors and interrupts."""
        if self.size > 1 or "TORCHELASTIC_RESTART_COUNT" in self._environment:
            base, _, _ = next(torch.distributed.rendezvous("env://"))
            self._lasting = base
            self._store = torch.distributed.PrefixStore(f"attempt {self._attempt}", base)

    @property
    def _attempt(self) -> int:
        return int(self._environment.get("TORCHELASTIC_RESTART_COUNT", 0))

    def begins(self, output: Path) -> None:
        """Note that the run in this folder has begun: processes that torchrun restarts go on with it."""
        if self._store is not None:
            self._lasting.set(f"run {output.resolve()}", "begun")

    def restarted(self, output: Path) -> bool:
        """Whether these processes take the place of others that had begun the run in this folder.

        A run that was refused has not begun, and is refused again.
        """
        return self._store is not None and self._attempt > 0 and self._lasting.check([f"run {output.resolve()}"])

    def join(self, stages: int, replicas: int, device: torch.device) -> Team:
        """Form the process group of all processes, over NCCL on CUDA, otherwise over gloo."""
        torch.distributed.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=torch.distributed.PrefixStore("group", self._store),
            rank=self.rank,
            world_size=self.size,
        )
        return Team(stages, replicas, device, self._store)

    def fail(self, message: str) -> None:
        """Print an error, unless another process has: what fails first is why the others do."""
        try:
            first = self._store is None or self._store.add("errors", 1) == 1
        except RuntimeError:  # torchrun has ended
            first = True
        if first:
            where = f" (rank {self.rank} of {self.size})" if self.size > 1 else ""
            print(f"error{where}: {message}", file=sys.stderr, flush=True)

    def crash(self, error: Exception) -> None:
        """Print an unexpected error once, with its traceback."""
        self.fail("".join(traceback.format_exception(error)).rstrip())

    def leave(self, status: int) -> int:
        """End a process of several, at once: it may be in the middle of messages that nobody will answer any more."""
        if self.size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        return status


class Alone:
    """The one process of a run, and what it has in common with each of several.

    Attributes:
        rank, size: among all.
        first: whether it is the one that writes and prints.
        mesh: as :class:`auglocal_ext.LocalStep` takes it; None for one process.
        stages, replicas: how many.
        stage, replica: this process's.
        device: this process's.
    """

    rank, size, first = 0, 1, True
    stages, replicas, stage, replica = 1, 1, 0, 0
    mesh: Any = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def everyone(self, value: _Value) -> list[_Value]:
        """The value of each process, in order of rank; a collective call, as all below are."""
        return [value]

    def wait(self) -> None:
        """Until all processes are here: what the first one writes between epochs is no part of their steps."""
        self.everyone(None)

    def any(self, value: bool) -> bool:
        """Whether it is true in one process."""
        return any(self.everyone(value))

    def some(self, value: _Value | None) -> _Value | None:
        """The first value in order of rank that is not None."""
        return next((each for each in self.everyone(value) if each is not None), None)

    def on_first(self, work: Callable[[], None]) -> None:
        """Do it in the first process, while the others wait; raises in all if it fails."""
        work()

    def stop(self, what: str, *, replicas: bool = True) -> Stop:
        """For a loop that all processes run, or, without ``replicas``, the stages of this process's replica."""
        return Stop()

    def whole(self, sums: EpochSums, first: int, modules: int) -> EpochSums:
        """The sums of all processes.

        Args:
            sums: of this process's local modules and its part of the batches.
            first: the first of its local modules.
            modules: of all stages.
        """
        return sums

    def total(self, sums: EpochSums) -> EpochSums:
        """The sums of the last stages, which see the network's output."""
        return sums


class Team(Alone):
    """This process among the several of its run, in a mesh of stages and replicas."""

    def __init__(self, stages: int, replicas: int, device: torch.device, store: Any) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.rank, self.size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.first = self.rank == 0
        self.stages, self.replicas, self.device = stages, replicas, device
        self.mesh = init_device_mesh(device.type, (stages, replicas), mesh_dim_names=("stage", "replica"))
        self.stage, self.replica = divmod(self.rank, replicas)
        # Plain values travel between hosts, not devices.
        self._group = (
            torch.distributed.group.WORLD if device.type == "cpu" else torch.distributed.new_group(backend="gloo")
        )
        self._store = store

    def everyone(self, value: _Value) -> list[_Value]:
        return everyone(value, self._group)

    def on_first(self, work: Callable[[], None]) -> None:
        together(lambda: work() if self.first else None, self._group)

    def stop(self, what: str, *, replicas: bool = True) -> Stop:
        leader = self.stage == 0 and (self.replica == 0 or not replicas)
        return SharedStop(self._store, what if replicas else f"{what} of replica {self.replica}", leader)

    def whole(self, sums: EpochSums, first: int, modules: int) -> EpochSums:
        return EpochSums.joined(self.everyone((self.stage, first, sums.state_dict())), sums, modules)

    def total(self, sums: EpochSums) -> EpochSums:
        last = self.stages - 1
        return EpochSums.joined(
            [(0, 0, state) for stage, state in self.everyone((self.stage, sums.state_dict())) if stage == last], sums, 1
        )


class Stop:
    """Whether a loop ends before all of its rounds are done, because its process was asked to stop."""

    def after(self, done: int, asked: bool) -> bool:
        """Whether to stop when the round ``done`` is over; to be called after every round."""
        return asked


class SharedStop(Stop):
    """Brings all processes of a loop to a stop after the same round, once one of them was asked to.

    The leader names the round after the one in which it hears of the request, before it begins that. No process can
    finish that round before, because it takes features, or an average of gradients, that the leader's own has made.
    """

    def __init__(self, store: Any, name: str, leader: bool) -> None:
        self._store, self._leader = store, leader
        self._asked, self._named = "stop asked for", f"last round of {name}"
        self._last: int | None = None
        self._told = False

    def after(self, done: int, asked: bool) -> bool:
        if asked and not self._told:
            self._store.set(self._asked, "")
            self._told = True
        if self._last is None and self._leader and self._store.check([self._asked]):
            self._last = done + 1
            self._store.set(self._named, str(self._last))
            self._store.check([self._named])  # set() does not wait for the store, and features must not overtake it
        elif self._last is None and not self._leader and self._store.check([self._named]):
            self._last = int(self._store.get(self._named))
        return self._last is not None and done >= self._last

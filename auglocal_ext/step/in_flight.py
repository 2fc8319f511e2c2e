"""What a checkpoint holds of a run besides network and optimizer: batches in flight, and parameters that are followed.

Features that were sent and not yet trained on are ``flight.REPLICA.features.STAGE.I.J``: tensor J of the I-th batch,
the oldest first. The batches themselves are ``flight.REPLICA.batch.AGE.x`` and ``.y``. Older parameters that an
auxiliary network will read are ``followed.MODULE.I.VERSION.J``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..auxiliary.followed import Followed
from ..distributed import CheckpointError, Form, Stored
from ..local_modules import LocalModule
from .course import Batch
from .pipeline import Pipeline


@dataclass(frozen=True)
class Place:
    """Where this process is among those that train the network.

    Attributes:
        modules: its local modules.
        pipeline: its stages; None where the network is not cut into stages.
        cuts: the first local module of every stage but the first.
        replica, replicas: which, of how many.
        device: of its tensors.
    """

    modules: Sequence[LocalModule]
    pipeline: Pipeline | None
    cuts: tuple[int, ...]
    replica: int
    replicas: int
    device: torch.device

    def followed(self) -> Iterable[tuple[tuple[int, int], Followed]]:
        """What is kept of parameters that are followed, by local module and number."""
        for module in self.modules:
            for at, followed in enumerate(module.followed):
                if not followed.immediate:
                    yield (module.index, at), followed


def collect(place: Place) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and what else is to be known of them; to be merged over all processes by :func:`merged`."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {"begun": 0, "flight": None, "orders": {}, "followed": {}}
    for key, followed in place.followed():
        kept = followed.kept()
        facts["followed"][key] = (followed.steps, tuple(kept))
        facts["begun"] = max(facts["begun"], followed.steps)
        for version, copies in kept.items():
            for at, copy in enumerate(copies):
                tensors[f"followed.{'.'.join(map(str, key))}.{version}.{at}"] = copy
    if place.pipeline is None:
        return tensors, facts
    course = place.pipeline.course
    if not course.under_way:
        facts["begun"] = course.begun + course.batches
        return tensors, facts
    facts["begun"] = course.begun
    facts["flight"] = (course.delay, place.cuts, place.replicas, course.batches)
    named: dict[str, Tensor] = {}
    for age, (x, y) in enumerate(reversed(course.kept(place.pipeline.stages[-1]))):
        named |= {f"batch.{age}.x": x, f"batch.{age}.y": y}
    for stage, batches in place.pipeline.in_flight().items():
        for i, features in enumerate(batches):
            named |= {f"features.{stage}.{i}.{j}": each for j, each in enumerate(features)}
    for name, tensor in named.items():
        form = Form.of(tensor)
        tensors[f"flight.{place.replica}.{name}"] = form.as_message(tensor)
        facts["orders"][f"flight.{place.replica}.{name}"] = form.order
    return tensors, facts


def merged(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of all processes as one."""
    whole: dict[str, Any] = {"begun": max(part["begun"] for part in parts), "flight": parts[0]["flight"]}
    for name in ("orders", "followed"):
        whole[name] = {key: value for part in parts for key, value in part[name].items()}
    return whole


@dataclass
class Resumed:
    """What this process takes from a checkpoint: tensors to be read by name, then :meth:`apply`."""

    place: Place
    facts: Mapping[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def apply(self) -> None:
        """Go on where the checkpoint was written; in all processes."""
        pipeline, facts = self.place.pipeline, self.facts
        if pipeline is not None:
            kept, features = self._in_flight() if facts["flight"] else ([], {})
            pipeline.restart(facts["begun"], facts["flight"][3] if facts["flight"] else 0, kept, features)
        for key, followed in self.place.followed():
            steps, versions = facts["followed"][key]
            name, count = f"followed.{'.'.join(map(str, key))}", len(followed.parameters)
            copies = {v: [self.tensors[f"{name}.{v}.{at}"] for at in range(count)] for v in versions}
            followed.resume(steps, copies)

    def _in_flight(self) -> tuple[list[Batch], dict[int, list[list[Tensor]]]]:
        begin = f"flight.{self.place.replica}."
        found = {
            name.removeprefix(begin): message.permute([order.index(axis) for axis in range(len(order))])
            for name, message in self.tensors.items()
            if name.startswith(begin) and (order := self.facts["orders"][name])
        }
        ages = sum(name.startswith("batch.") and name.endswith(".x") for name in found)
        kept = [(found[f"batch.{age}.x"], found[f"batch.{age}.y"]) for age in reversed(range(ages))]
        features: dict[int, dict[tuple[int, int], Tensor]] = {}
        for name, tensor in found.items():
            if name.startswith("features."):
                stage, i, j = map(int, name.split(".")[1:])
                features.setdefault(stage, {})[i, j] = tensor
        rows = {
            stage: [[row[at] for at in sorted(row) if at[0] == i] for i in sorted({i for i, _ in row})]
            for stage, row in features.items()
        }
        return kept, rows


def targets(place: Place, stored: Stored, folder: Any) -> Resumed:
    """What this process is to read of a checkpoint.

    Raises:
        CheckpointError: for batches in flight among other stages or replicas, or with another delay, and if parameters
            that a rule follows are missing.
    """
    facts = stored.rest.get("run", {"begun": 0, "flight": None, "orders": {}, "followed": {}})
    pipeline, flight = place.pipeline, facts["flight"]
    resumed = Resumed(place, facts)
    names: list[str] = []
    if flight is not None:
        ours = (0 if pipeline is None else pipeline.course.delay, place.cuts, place.replicas)
        if ours != flight[:3]:
            raise CheckpointError(
                f"{folder} holds batches in flight with {_said(*flight[:3])}, and here it is {_said(*ours)}: only "
                "the same can go on with them. Call step.drain() before step.save() to resume otherwise"
            )
        assert pipeline is not None
        begin = f"flight.{place.replica}."
        ages = range(min(flight[3], pipeline.stages[-1] * pipeline.course.delay))
        names += [f"{begin}batch.{age}.{of}" for age in ages for of in "xy"]
        features = tuple(f"{begin}features.{stage}." for stage in pipeline.stages)
        names += [name for name in facts["orders"] if name.startswith(features)]
    for key, followed in place.followed():
        if key not in facts["followed"]:
            raise CheckpointError(
                f"{folder} has no earlier parameters of those that local module {key[0]} follows: it was written by "
                "a step whose rule keeps none"
            )
        for version in facts["followed"][key][1]:
            for at, parameter in enumerate(followed.parameters):
                name = f"followed.{'.'.join(map(str, key))}.{version}.{at}"
                resumed.tensors[name] = torch.empty_like(parameter.detach(), device=place.device)
    for name in names:
        size, dtype = stored.forms[name]
        resumed.tensors[name] = torch.empty(size, dtype=dtype, device=place.device)
    return resumed


def state_dict(place: Place, stages: bool) -> dict[str, Any]:
    """What a plain checkpoint holds of this besides; ``stages``: whether this process holds one of several.

    Raises:
        RuntimeError: for what it cannot hold.
    """
    refuse(place, "call step.drain() first, or step.save(folder), which saves them")
    state = {key: (followed.steps, followed.kept()) for key, followed in place.followed()}
    if state and stages:
        raise RuntimeError(
            "the rule follows earlier parameters of other stages, which are no part of a state dict: call "
            "step.save(folder), which saves them"
        )
    return {"followed": state} if state else {}


def refuse(place: Place, what: str) -> None:
    """RuntimeError with batches in flight."""
    if place.pipeline is not None and place.pipeline.course.under_way:
        raise RuntimeError(f"batches are in flight, which are no part of a state dict: {what}")


def load_state_dict(place: Place, state: Mapping[str, Any]) -> None:
    """The inverse of :func:`state_dict`; what is not there stays as it is."""
    for key, followed in place.followed():
        if key in state.get("followed", {}):
            steps, copies = state["followed"][key]
            followed.resume(steps, {v: [c.to(place.device, copy=True) for c in each] for v, each in copies.items()})


def _said(delay: int, cuts: tuple[int, ...], replicas: int) -> str:
    return f"delay={delay}, stage_cuts={cuts} and {replicas} replica{'s' * (replicas > 1)}"

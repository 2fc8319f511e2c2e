"""Sums over an epoch, kept on the device so that no step waits for the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...tasks import Scored, Task
from .measures import ACCURACY, Form, measures_of


@dataclass(frozen=True)
class StepResult:
    """A step's mean loss (scalar), local losses (K,) and what is counted of each module (K,), all on the device.

    ``module_counts`` is -1 where a module counts nothing, and (K, *count_shape) where the task counts several numbers.
    The last module's are the network's. ``counted`` is how many targets they are out of.
    """

    loss: Tensor
    module_losses: Tensor
    module_counts: Tensor
    counted: Tensor | int

    @classmethod
    def of_one_module(cls, scored: Scored, counted: Tensor | int) -> StepResult:
        """Of a network that is trained, or tested, as a whole."""
        loss = scored.loss.detach()
        return cls(loss, loss.reshape(1), scored.tally[None], counted)


@dataclass(frozen=True)
class Reading:
    """Means over what was seen so far.

    Attributes:
        loss: of a step.
        module_losses: of each module.
        measured: what is measured of each module, the task's own last; nan of a module that counts nothing.
    """

    loss: float
    module_losses: tuple[float, ...]
    measured: dict[Form, tuple[float, ...]]

    def of_network(self) -> dict[Form, float]:
        """What is measured of the network, which is that of the last module."""
        return {form: values[-1] for form, values in self.measured.items()}

    @property
    def module_accuracies(self) -> tuple[float, ...]:
        """Of each module: of pixels, where targets are masks."""
        return self.measured[ACCURACY]

    @property
    def accuracy(self) -> float:
        """The network's."""
        return self.module_accuracies[-1]

    @property
    def metric(self) -> tuple[Form, float]:
        """The task's own, of the network."""
        return list(self.of_network().items())[-1]


_PLAIN = ("steps", "images", "seconds", "waiting")


class EpochSums:
    """How far an epoch has come, and its sums of losses, weighted by images or tokens, and of what is counted.

    ``steps``, ``images`` (of text: tokens), ``seconds`` and ``waiting`` (seconds in which steps waited for their batch)
    are plain numbers; reading the sums is the one synchronisation.

    Args:
        modules: K.
        device: of the sums.
        task: what is learned; None: what is counted are right answers.
        bytes_per_token: of text.
    """

    def __init__(self, modules: int, device: torch.device, task: Task | None = None, bytes_per_token: float = 1.0):
        self.steps = self.images = 0
        self.seconds = self.waiting = 0.0
        self._modules, self._task, self._bytes_per_token = modules, task, bytes_per_token
        self._shape = () if task is None else task.count_shape
        self._counts = math.prod(self._shape)
        # The loss, the local losses, the counts of each module, and what they are out of; fp64: half a million images'
        # losses must add up to more digits than fp32 has.
        self._sums = torch.zeros(2 + modules + modules * self._counts, dtype=torch.float64, device=device)

    def add(self, result: StepResult, images: int) -> None:
        losses = torch.cat([result.loss.detach().reshape(1), result.module_losses.detach()]).double()
        self._sums[: len(losses)] += losses * images
        self._sums[len(losses) : -1] += result.module_counts.flatten()
        self._sums[-1] += result.counted
        self.steps += 1
        self.images += images

    def read(self) -> Reading:
        sums, images = self._sums.cpu(), max(1, self.images)
        loss, *losses = (sums[: 1 + self._modules] / images).tolist()
        counts, counted = sums[1 + self._modules : -1].reshape(self._modules, *self._shape), float(sums[-1])
        measures = measures_of(self._task, self._bytes_per_token)
        return Reading(
            loss, tuple(losses), {form: tuple(of(counts, counted).tolist()) for form, of in measures.items()}
        )

    @classmethod
    def joined(cls, parts: Sequence[tuple[int, int, dict[str, Any]]], own: EpochSums, modules: int) -> EpochSums:
        """The sums over ``modules`` local modules from those of processes, each with some of them.

        Args:
            parts: of each process its stage, its first local module and the state of its sums.
            own: those of this process, whose steps and seconds are taken.
        """
        whole = cls(modules, torch.device("cpu"), own._task, own._bytes_per_token)
        for stage, first, state in parts:
            sums = state["sums"]
            whole._sums[0] += sums[0]
            for here, there in whole._places(sums, whole._sums, first):
                whole._sums[there] += sums[here]
            if stage == 0:  # all stages have seen the same images
                whole._sums[-1] += sums[-1]
                whole.images += state["images"]
        whole.steps, whole.seconds, whole.waiting = own.steps, own.seconds, own.waiting
        return whole

    def _places(self, part: Tensor, whole: Tensor, first: int) -> list[tuple[slice, slice]]:
        """Losses and counts of a part of the modules, from ``first`` on: where in its sums, and in those of all."""
        count, modules = ((len(sums) - 2) // (1 + self._counts) for sums in (part, whole))
        return [
            (slice(start, start + count * each), slice(there + first * each, there + (first + count) * each))
            for start, there, each in ((1, 1, 1), (1 + count, 1 + modules, self._counts))
        ]

    def load_part(self, state: dict[str, Any], stage: int, replica: int, first: int) -> None:
        """Load this process's part of the sums of a run: the first replica takes them, each stage its modules'."""
        whole = state["sums"]
        self.load_state_dict({**state, "sums": torch.zeros_like(self._sums)})
        if replica > 0:
            self.images = 0
            return
        for here, there in self._places(self._sums, whole, first):
            self._sums[here] = whole[there]
        self._sums[-1] = whole[-1]
        if stage == 0:
            self._sums[0] = whole[0]

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _PLAIN} | {"sums": self._sums.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _PLAIN:
            setattr(self, name, state[name])
        self._sums.copy_(state["sums"])

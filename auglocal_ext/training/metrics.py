"""Sums over an epoch, kept on the device so that no step waits for the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..tasks import Scored


@dataclass(frozen=True)
class StepResult:
    """A step's mean loss (scalar), local losses (K,) and right answers of each module (K,), all on the device.

    ``module_counts`` is -1 where a module counts nothing. The last module's are the network's. ``counted`` is how many
    targets they are out of.
    """

    loss: Tensor
    module_losses: Tensor
    module_counts: Tensor
    counted: Tensor | int

    @classmethod
    def of_one_module(cls, scored: Scored, counted: Tensor | int) -> StepResult:
        """Of a network that is trained, or looked at, as a whole."""
        loss = scored.loss.detach()
        return cls(loss, loss.reshape(1), scored.tally.reshape(1), counted)


@dataclass(frozen=True)
class Reading:
    """Means over what was seen so far; a module that counts nothing has the accuracy nan."""

    loss: float
    module_losses: tuple[float, ...]
    module_accuracies: tuple[float, ...]

    @property
    def accuracy(self) -> float:
        """The network's, which is that of the last module."""
        return self.module_accuracies[-1]


_PLAIN = ("steps", "images", "seconds", "waiting")


class EpochSums:
    """How far an epoch has come, and its image-weighted sums of losses and hits.

    ``steps``, ``images``, ``seconds`` and ``waiting`` (seconds in which steps waited for their batch) are plain
    numbers; reading the sums is the one synchronisation.
    """

    def __init__(self, modules: int, device: torch.device):
        self.steps = self.images = 0
        self.seconds = self.waiting = 0.0
        # The loss, the local losses, the hits of each module, and what they are out of; fp64: half a million images'
        # losses must add up to more digits than fp32 has.
        self._sums = torch.zeros(2 + 2 * modules, dtype=torch.float64, device=device)
        self._modules = modules

    def add(self, result: StepResult, images: int) -> None:
        losses = torch.cat([result.loss.detach().reshape(1), result.module_losses.detach()]).double()
        self._sums[: len(losses)] += losses * images
        self._sums[len(losses) : -1] += result.module_counts
        self._sums[-1] += result.counted
        self.steps += 1
        self.images += images

    def read(self) -> Reading:
        loss, *modules, counted = self._sums.tolist()
        losses = [total / max(1, self.images) for total in modules[: self._modules]]
        shares = [math.nan if hits < 0 else hits / max(1.0, counted) for hits in modules[self._modules :]]
        return Reading(loss / max(1, self.images), tuple(losses), tuple(shares))

    @classmethod
    def joined(cls, parts: Sequence[tuple[int, int, dict[str, Any]]], own: EpochSums, modules: int) -> EpochSums:
        """The sums over ``modules`` local modules from those of processes, each with some of them.

        Args:
            parts: of each process its stage, its first local module and the state of its sums.
            own: those of this process, whose steps and seconds are taken.
        """
        whole = cls(modules, torch.device("cpu"))
        for stage, first, state in parts:
            sums = state["sums"]
            count = (len(sums) - 2) // 2
            whole._sums[0] += sums[0]
            for start, there in ((1, 1), (1 + count, 1 + modules)):
                whole._sums[there + first : there + first + count] += sums[start : start + count]
            if stage == 0:  # all stages have seen the same images
                whole._sums[-1] += sums[-1]
                whole.images += state["images"]
        whole.steps, whole.seconds, whole.waiting = own.steps, own.seconds, own.waiting
        return whole

    def load_part(self, state: dict[str, Any], stage: int, replica: int, first: int) -> None:
        """Load this process's part of the sums of a run: the first replica takes them, each stage its modules'."""
        whole = state["sums"]
        modules, count = (len(whole) - 2) // 2, self._modules
        self.load_state_dict({**state, "sums": torch.zeros_like(self._sums)})
        if replica > 0:
            self.images = 0
            return
        for start, there in ((1, 1), (1 + count, 1 + modules)):
            self._sums[start : start + count] = whole[there + first : there + first + count]
        self._sums[-1] = whole[-1]
        if stage == 0:
            self._sums[0] = whole[0]

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _PLAIN} | {"sums": self._sums.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _PLAIN:
            setattr(self, name, state[name])
        self._sums.copy_(state["sums"])

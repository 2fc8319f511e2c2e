"""Sums over an epoch, kept on the device so that no step waits for the host."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...tasks import Scored, Segmentation


@dataclass(frozen=True)
class StepResult:
    """A step's mean loss (scalar), local losses (K,) and right answers of each module (K,), all on the device.

    ``module_counts`` is -1 where a module counts nothing; of masks it is (K, 2, C), see :class:`Segmentation`. The last
    module's are the network's. ``counted`` is how many targets they are out of.
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
    """Means over what was seen so far; a module that counts nothing has the accuracy nan.

    Of masks accuracies are over pixels, and ``module_mious`` says the mean intersection over union.
    """

    loss: float
    module_losses: tuple[float, ...]
    module_accuracies: tuple[float, ...]
    module_mious: tuple[float, ...] | None = None

    @property
    def accuracy(self) -> float:
        """The network's, which is that of the last module."""
        return self.module_accuracies[-1]

    @property
    def miou(self) -> float | None:
        """The network's; None without masks."""
        return None if self.module_mious is None else self.module_mious[-1]

    @property
    def metric(self) -> float:
        """The task's own: mIoU of masks, else the accuracy."""
        return self.accuracy if self.miou is None else self.miou


_PLAIN = ("steps", "images", "seconds", "waiting")


class EpochSums:
    """How far an epoch has come, and its image-weighted sums of losses and hits.

    ``steps``, ``images``, ``seconds`` and ``waiting`` (seconds in which steps waited for their batch) are plain
    numbers; reading the sums is the one synchronisation.

    Args:
        modules: K.
        device: of the sums.
        masks: the task, if targets are masks.
    """

    def __init__(self, modules: int, device: torch.device, masks: Segmentation | None = None):
        self.steps = self.images = 0
        self.seconds = self.waiting = 0.0
        self._modules, self._masks = modules, masks
        self._counts = 1 if masks is None else math.prod(masks.count_shape)
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
        counts, counted = sums[1 + self._modules : -1], float(sums[-1])
        if self._masks is None:
            shares = [math.nan if hits < 0 else hits / max(1.0, counted) for hits in counts.tolist()]
            return Reading(loss, tuple(losses), tuple(shares))
        counts = counts.reshape(self._modules, *self._masks.count_shape)
        accuracies, mious = self._masks.pixel_accuracy(counts, counted), self._masks.measure(counts, counted)
        return Reading(loss, tuple(losses), tuple(accuracies.tolist()), tuple(mious.tolist()))

    @classmethod
    def joined(cls, parts: Sequence[tuple[int, int, dict[str, Any]]], own: EpochSums, modules: int) -> EpochSums:
        """The sums over ``modules`` local modules from those of processes, each with some of them.

        Args:
            parts: of each process its stage, its first local module and the state of its sums.
            own: those of this process, whose steps and seconds are taken.
        """
        whole = cls(modules, torch.device("cpu"), own._masks)
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

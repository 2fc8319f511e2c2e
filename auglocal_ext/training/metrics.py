"""Sums over an epoch, kept on the device so that no step waits for the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepResult:
    """A step's mean loss (scalar), the local losses (K,), the number of right answers, all on the device."""

    loss: Tensor
    module_losses: Tensor
    correct: Tensor


@dataclass(frozen=True)
class Reading:
    """Means over the images seen so far."""

    loss: float
    accuracy: float
    module_losses: tuple[float, ...]


_PLAIN = ("steps", "images", "seconds", "waiting")


class EpochSums:
    """How far an epoch has come, and its image-weighted sums of losses and hits.

    ``steps``, ``images``, ``seconds`` and ``waiting`` (seconds in which steps waited for their batch) are plain
    numbers; reading the sums is the one synchronisation.
    """

    def __init__(self, modules: int, device: torch.device):
        self.steps = self.images = 0
        self.seconds = self.waiting = 0.0
        # fp64: half a million images' losses must add up to more digits than fp32 has.
        self._sums = torch.zeros(modules + 2, dtype=torch.float64, device=device)

    def add(self, result: StepResult, images: int) -> None:
        losses = torch.cat([result.loss.detach().reshape(1), result.module_losses.detach()]).double()
        self._sums[:-1] += losses * images
        self._sums[-1] += result.correct
        self.steps += 1
        self.images += images

    def read(self) -> Reading:
        count = max(1, self.images)
        loss, *modules, correct = (self._sums / count).tolist()
        return Reading(loss, correct, tuple(modules))

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _PLAIN} | {"sums": self._sums.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in _PLAIN:
            setattr(self, name, state[name])
        self._sums.copy_(state["sums"])

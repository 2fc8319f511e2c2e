"""What trains a network batch by batch, however it does."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...distributed import StepTimes
from ...step import MemoryPlan
from ...tasks import Scored
from ..config.settings import AMP
from .metrics import StepResult


class Learner(Protocol):
    """A network and the way it is trained: ``modules`` local modules, of which this process trains its ``own``."""

    modules: int
    own: range
    grad_scaler: torch.amp.GradScaler | None

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """What was chosen to be recomputed, where it was planned."""

    @property
    def classifier_weight(self) -> float:
        """Weight of the network's own loss in the last module's."""

    @property
    def network(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """For the learning rate in its ``param_groups``."""

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        """Train on a batch; on CUDA without waiting for the device."""

    def predict(self, images: Tensor) -> Tensor | None:
        """The network's output, without gradients; None in a process that does not have the last module."""

    def score(self, images: Tensor, labels: Tensor) -> Scored | None:
        """Loss and count of the network's output, without gradients; None as for ``predict``."""

    def finish(self) -> None:
        """No batch follows for now: at the end of an epoch, and before a checkpoint."""

    @property
    def times(self) -> StepTimes | None:
        """Where this process's time goes, among several on CPUs."""

    def launch(self) -> str:
        """How steps will be launched, for a person."""

    def predicted_peak(self, images: int) -> int:
        """Peak bytes of the tensors of a step on ``images`` images, predicted in seconds on any machine.

        As :func:`auglocal_ext.planning.plan_memory` counts them; the weights and the random state are not touched.
        """

    def outcome(self) -> str | None:
        """How the steps so far ran."""

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on besides the network: optimizer and loss scaler."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Write what all processes hold; see :meth:`auglocal_ext.LocalStep.save`."""

    def load(self, folder: Path) -> None: ...


def autocast(amp: str, device: torch.device) -> AbstractContextManager[object]:
    """The autocast region of ``--amp``, for both training and evaluation."""
    dtype = AMP[amp]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)

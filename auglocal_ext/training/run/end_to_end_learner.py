"""Backpropagation through the whole network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...distributed import Mesh, StepTimes
from ...layers import Features
from ...memory import MemoryMeter
from ...memory.copies import FakeCopy, fake_mode_of
from ...step import MemoryPlan
from ...tasks import Scored
from ..config.train_config import TrainConfig
from ..errors import CheckpointError
from .kind import RunTask
from .learner import autocast
from .metrics import StepResult
from .networks import example_input
from .optimizers import make_optimizer, parameter_groups


def output_of(found: Any) -> Any:
    """What is learned of a network's output: ``"out"`` of the dictionary that networks for segmentation return."""
    return found["out"] if isinstance(found, Mapping) and "out" in found else found


class EndToEndLearner:
    """Backpropagation of the task's loss through the whole network; over replicas by DistributedDataParallel."""

    modules = 1
    own = range(1)
    times: StepTimes | None = None
    memory_plan: MemoryPlan | None = None
    classifier_weight = 1.0

    def __init__(
        self,
        network: nn.Module,
        task: RunTask,
        config: TrainConfig,
        input_shape: tuple[int, ...],
        device: torch.device,
        mesh: Mesh | None = None,
    ):
        self._trained = network if mesh is None else nn.parallel.DistributedDataParallel(network)
        self.network, self._task, self._amp, self._device = network, task, config.amp, device
        self._config, self._input_shape = config, input_shape
        # The fused form reads the loss scaler's verdict on the device.
        self.optimizer = make_optimizer(
            config, parameter_groups(config, network), fused=True if device.type == "cuda" else None
        )
        self.grad_scaler = torch.amp.GradScaler(device.type) if config.amp == "fp16" else None

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        self.optimizer.zero_grad(set_to_none=True)
        scored = self._scored(self._trained, images, labels)
        if self.grad_scaler is None:
            scored.loss.backward()
            self._clip()
            self.optimizer.step()
        else:
            self.grad_scaler.scale(scored.loss).backward()
            if self._config.clip_norm is not None:
                self.grad_scaler.unscale_(self.optimizer)
            self._clip()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        return StepResult.of_one_module(scored, self._task.counted(labels))

    def _clip(self) -> None:
        if self._config.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.network.parameters(), self._config.clip_norm)

    def _scored(self, network: nn.Module, images: Tensor, labels: Tensor) -> Scored:
        """Loss and count of the network's output, which a language model in one process does not make."""
        # A replica's part of a test batch may be empty.
        if self._task.fuses_readout and isinstance(network, nn.Sequential) and len(images):
            with autocast(self._amp, images.device):
                return self._task.score_of(network, images, labels)
        with autocast(self._amp, images.device):
            logits = output_of(network(images))
        return self._task.score(logits.float(), labels)

    def predict(self, images: Tensor) -> Tensor:
        with torch.no_grad(), autocast(self._amp, self._device):
            return cast("Tensor", output_of(self.network(images)))

    def score(self, images: Tensor, labels: Tensor) -> Scored:
        with torch.no_grad():
            return self._scored(self.network, images, labels)

    def finish(self) -> None:
        pass

    def launch(self) -> str:
        return "eager"

    def predicted_peak(self, images: int) -> int:
        memory_format = torch.channels_last if self._config.channels_last else torch.contiguous_format
        with fake_mode_of(self.network):
            network = FakeCopy(self.network).net
            optimizer = make_optimizer(self._config, parameter_groups(self._config, network))
            x = example_input(self._task, self._input_shape, images).contiguous(memory_format=memory_format)
            y = self._task.example_for(Features(self._input_shape), images)

            def step() -> None:
                optimizer.zero_grad(set_to_none=True)
                self._scored(network, x, y).loss.backward()
                optimizer.step()

            step()  # makes the optimizer's state
            with MemoryMeter() as meter:
                meter.track(network, optimizer, x, y)
                step()
        return meter.peak_bytes

    def outcome(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        scaler = None if self.grad_scaler is None else self.grad_scaler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "grad_scaler": scaler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.grad_scaler is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler"])

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        raise NotImplementedError("every process holds the whole of it: state_dict() of one is enough")

    def load(self, folder: Path) -> None:
        raise CheckpointError(f"{folder} was written by local modules; backpropagation has none")

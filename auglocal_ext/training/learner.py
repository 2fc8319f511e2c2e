"""One training step of a batch: by local losses, or end to end."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..local_sequential import LocalSequential
from ..models import build
from ..step import GraphCaptureError, LocalStep
from ..tasks import Classification, Task
from .config import AMP, GRAPH, TrainConfig, make_rule
from .errors import SettingsError
from .metrics import StepResult


class Learner(Protocol):
    """A network and the way it is trained."""

    modules: int
    grad_scaler: torch.amp.GradScaler | None

    @property
    def network(self) -> nn.Module: ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """For the learning rate in its ``param_groups``."""

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        """Train on a batch; on CUDA without waiting for the device."""

    def plan(self) -> str | None:
        """How steps will run, a line or several for the terminal."""

    def outcome(self) -> str | None:
        """How the steps so far ran."""

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on besides the network: optimizer and loss scaler."""

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def autocast(amp: str, device: torch.device) -> AbstractContextManager[object]:
    """The autocast region of ``--amp``, for both training and evaluation."""
    dtype = AMP[amp]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def make_network(
    config: TrainConfig, input_shape: tuple[int, int, int], task: Classification, device: torch.device
) -> LocalSequential | nn.Sequential:
    """The network of the resolved ``config`` with fresh weights on ``device``: as it is for backpropagation, cut into
    local modules for a rule. SettingsError if they do not fit.
    """
    rule = make_rule(config)
    try:
        layers = build(config.network, num_classes=task.num_classes, width=config.width)
        network: LocalSequential | nn.Sequential = layers
        if rule is not None:
            network = LocalSequential(
                layers, rule, task=task, input_shape=input_shape, modules=config.modules, fused=config.fused
            )
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error
    network.to(device)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    return network


def make_learner(
    config: TrainConfig, input_shape: tuple[int, int, int], task: Classification, device: torch.device
) -> Learner:
    """The network of the resolved ``config`` on ``device`` and its training; SettingsError if they do not fit."""
    network = make_network(config, input_shape, task, device)
    if isinstance(network, LocalSequential):
        if config.mixes:
            _try_mixed(network, task)
        return LocalLearner(network, config, device)
    _try(network, config.network, input_shape, device)
    return EndToEndLearner(network, task, config, device)


def _try_mixed(network: LocalSequential, task: Classification) -> None:
    """Whether every local loss takes class probabilities."""
    try:
        network.check_target(torch.full((2, task.num_classes), 1 / task.num_classes), 2)
    except TypeError as error:
        raise SettingsError(f"--mixup and --cutmix make class probabilities of labels: {error}") from error


def _try(network: nn.Module, name: str, input_shape: tuple[int, int, int], device: torch.device) -> None:
    """One image through the network shows a fully connected part made for another size before training."""
    network.eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, *input_shape, device=device))
    except RuntimeError as error:
        size = " x ".join(map(str, input_shape[1:]))
        raise SettingsError(f"{name} does not take images of {size}: {error}") from error


def _sgd(config: TrainConfig, parameters: Any, fused: bool | None = None) -> torch.optim.SGD:
    recipe = config.recipe_values
    return torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=True,
        weight_decay=recipe.weight_decay,
        fused=fused,
    )


class EndToEndLearner:
    """Backpropagation of the task's loss through the whole network."""

    modules = 1

    def __init__(self, network: nn.Module, task: Task, config: TrainConfig, device: torch.device):
        self.network, self._task, self._amp, self._device = network, task, config.amp, device
        # The fused form reads the loss scaler's verdict on the device.
        self.optimizer = _sgd(config, network.parameters(), fused=True if device.type == "cuda" else None)
        self.grad_scaler = torch.amp.GradScaler(device.type) if config.amp == "fp16" else None

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        self.optimizer.zero_grad(set_to_none=True)
        with autocast(self._amp, self._device):
            logits = self.network(images)
        scored = self._task.score(logits.float(), labels)
        if self.grad_scaler is None:
            scored.loss.backward()
            self.optimizer.step()
        else:
            self.grad_scaler.scale(scored.loss).backward()
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()
        return StepResult.of_one_module(scored, self._task.counted(labels))

    def plan(self) -> None:
        return None

    def outcome(self) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        scaler = None if self.grad_scaler is None else self.grad_scaler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "grad_scaler": scaler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
        if self.grad_scaler is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler"])


class LocalLearner:
    """Each local module by its own loss (:class:`auglocal_ext.step.LocalStep`)."""

    def __init__(self, network: LocalSequential, config: TrainConfig, device: torch.device):
        self.network, self._device, self._graph = network, device, config.graph
        self.modules = network.num_modules
        self._batch_size = config.recipe_values.batch_size
        try:
            self._step = LocalStep(
                network,
                lambda parameters: _sgd(config, parameters),
                graph=GRAPH[config.graph],
                overlap="auto" if config.overlap is None else config.overlap,
                autocast=AMP[config.amp],
                recompute=config.recompute if config.memory_budget is None else None,
                memory_budget=config.memory_budget,
                batch_size=self._batch_size,
            )
        except ValueError as error:
            raise SettingsError(str(error)) from error
        self.optimizer, self.grad_scaler = self._step.optimizer, self._step.grad_scaler
        self._steps = self._graphed = 0
        self._eager_reason: str | None = None

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        try:
            out = self._step(images, labels)
        except GraphCaptureError as error:
            raise SettingsError(f"--graph on: {error}") from error
        self._steps += 1
        self._graphed += self._step.graphed
        if len(labels) == self._batch_size:  # an epoch's smaller last batch is captured later than the others
            self._eager_reason = self._step.eager_reason
        return StepResult(out.loss, out.module_losses, out.module_counts, self.network.task.counted(labels))

    def plan(self) -> str:
        if self._graph == "off":
            line = "steps: eager (--graph off)"
        elif self._device.type != "cuda":
            line = f"steps: eager (CUDA graphs need a CUDA device, this run is on {self._device.type})"
        else:
            line = "steps: one CUDA graph each, captured after the first few"
        return line if self._step.plan is None else f"{line}\n{self._step.plan}"

    def outcome(self) -> str | None:
        """On CUDA, where a graph was wanted: how many steps ran as one, and why not all."""
        if self._graph == "off" or self._device.type != "cuda":
            return None
        line = f"steps: {self._graphed} of {self._steps} as one CUDA graph"
        return line if self._eager_reason is None else f"{line} ({self._eager_reason})"

    def state_dict(self) -> dict[str, Any]:
        return self._step.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step.load_state_dict(state)

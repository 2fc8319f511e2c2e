"""Forward and backward of one batch: by local losses, or end to end."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..local_sequential import LocalSequential
from ..models import build
from .config import AMP, TrainConfig, make_rule
from .errors import SettingsError
from .metrics import StepResult


class Learner(Protocol):
    """A network and the way its gradients are made."""

    modules: int

    @property
    def network(self) -> nn.Module: ...

    def step(self, images: Tensor, labels: Tensor, scaler: torch.amp.GradScaler | None) -> StepResult:
        """Add the batch's gradients to ``.grad``, multiplied by the scaler's scale if there is one."""


def autocast(amp: str, device: torch.device) -> AbstractContextManager[object]:
    """The autocast region of ``--amp``, for both training and evaluation."""
    dtype = AMP[amp]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


def make_learner(
    config: TrainConfig, input_shape: tuple[int, int, int], num_classes: int, device: torch.device
) -> Learner:
    """The network of ``config`` on ``device``, wrapped by its rule; SettingsError if they do not fit."""
    rule = make_rule(config)
    try:
        layers = build(config.network, num_classes=num_classes, width=config.width)
        network: nn.Module = layers
        if rule is not None:
            network = local = LocalSequential(
                layers,
                rule,
                num_classes,
                input_shape,
                config.modules,
                fused=config.fused,
                recompute=config.recompute,
            )
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error
    network.to(device)
    if config.channels_last:
        network.to(memory_format=torch.channels_last)
    if rule is not None:
        return LocalLearner(local, config.amp, device)
    _try(network, config.network, input_shape, device)
    return EndToEndLearner(network, config.amp, device)


def _try(network: nn.Module, name: str, input_shape: tuple[int, int, int], device: torch.device) -> None:
    """One image through the network shows a fully connected part made for another size before training."""
    network.eval()
    try:
        with torch.no_grad():
            network(torch.zeros(1, *input_shape, device=device))
    except RuntimeError as error:
        size = " x ".join(map(str, input_shape[1:]))
        raise SettingsError(f"{name} does not take images of {size}: {error}") from error


class EndToEndLearner:
    """Backpropagation of the cross-entropy through the whole network."""

    modules = 1

    def __init__(self, network: nn.Module, amp: str, device: torch.device):
        self.network, self._amp, self._device = network, amp, device

    def step(self, images: Tensor, labels: Tensor, scaler: torch.amp.GradScaler | None) -> StepResult:
        with autocast(self._amp, self._device):
            logits = self.network(images)
        loss = F.cross_entropy(logits.float(), labels)
        (loss if scaler is None else scaler.scale(loss)).backward()
        loss = loss.detach()
        correct = (logits.detach().argmax(dim=1) == labels).sum()
        return StepResult(loss, loss.reshape(1), correct)


class LocalLearner:
    """Each local module by its own loss; ``correct`` counts the last module's hits."""

    def __init__(self, network: LocalSequential, amp: str, device: torch.device):
        self.network, self._amp, self._device = network, amp, device
        self.modules = network.num_modules

    def step(self, images: Tensor, labels: Tensor, scaler: torch.amp.GradScaler | None) -> StepResult:
        with autocast(self._amp, self._device):
            out = self.network(images, labels, grad_scaler=scaler)
        (out.loss if scaler is None else scaler.scale(out.loss)).backward()
        return StepResult(out.loss.detach(), out.module_losses, out.module_correct[-1])

"""Small networks trained on the frozen outputs of a network's layers, all layers in one pass over the data.

Linear probes, decoders and strong classifiers are all readouts: a small network with its own optimizer. Each steps
before the next layer runs, which is local learning again, so a result does not depend on which other readouts there
are. Inputs are standardised, and decoders have no BatchNorm inside: a collapsed layer puts out the same for all
images and has no variance to divide by.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ..layers import Features, evaluating
from ..training.progress_bar import progress_bar
from ..training.run.metrics import EpochSums, Reading, StepResult
from .features import layer_features, layer_names, layer_outputs

Batch = tuple[Tensor, Tensor]


class Source(Protocol):
    """Batches of images ``(N, *input_shape)``, normalised for the network, and labels ``(N,)``, int64.

    The batches of :mod:`auglocal_ext.training` are one, :class:`Loaders` makes one of two DataLoaders.
    """

    steps: int

    def train(self, epoch: int) -> Iterator[Batch]:
        """``steps`` batches; epochs count from 1."""

    def test(self) -> Iterator[Batch]:
        """Held-out data, each once."""


@dataclass(frozen=True)
class Loaders:
    """A :class:`Source` of two DataLoaders, or other iterables with a length."""

    train_loader: Sequence[Batch] | torch.utils.data.DataLoader[Batch]
    test_loader: Sequence[Batch] | torch.utils.data.DataLoader[Batch]

    @property
    def steps(self) -> int:
        return len(self.train_loader)

    def train(self, epoch: int) -> Iterator[Batch]:
        return iter(self.train_loader)

    def test(self) -> Iterator[Batch]:
        return iter(self.test_loader)


class Readout(nn.Module, ABC):
    """Looks at a layer's output ``h``; its own optimizer trains it, nothing else is trained."""

    @abstractmethod
    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        """A fresh optimizer of the parameters."""

    @abstractmethod
    def outcome(self, h: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss of the batch, with graph, and the number of right answers (0 where nothing is classified)."""


def standardisation(channels: int, positions: int) -> nn.Module:
    """BatchNorm without weights for ``(N, channels, *positions)`` of so many position axes, 0 to 3.

    What it sees stays what it is while a readout trains, so its statistics are averaged over all batches alike.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return kinds[positions](channels, affine=False, momentum=None)


@dataclass(frozen=True)
class Score:
    """Mean loss and accuracy of a readout: on the training images of the last epoch, and on held-out ones."""

    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float


def _result(outcomes: Sequence[tuple[Tensor, Tensor]], images: int) -> StepResult:
    """What the readouts came to on a batch of so many images, each as the local module it is."""
    losses = torch.stack([loss.detach() for loss, _ in outcomes])
    return StepResult(losses.sum(), losses, torch.stack([correct for _, correct in outcomes]), images)


def train_readouts(
    network: nn.Module,
    make: Callable[[Features], Readout],
    source: Source,
    input_shape: tuple[int, ...],
    *,
    epochs: int,
    lr: float,
    seed: int,
    label: str,
    bars: bool,
) -> list[tuple[str, Readout, Score]]:
    """Train one readout per layer, ``make(features of its output)``, and score it on held-out data.

    The network is frozen, in eval mode; its mode is restored. Every batch runs through it once, and each layer's
    readout takes its step before the next layer runs: one layer's output and one readout's activations exist at a
    time, so that memory grows neither with the data nor, but for the readouts' parameters, with the number of layers.
    Learning rates fall as a cosine from those of ``optimizer(lr)`` to 0 over all steps. What is drawn comes from
    ``seed``, and the random state is left as it was. Batches of one image are left out: BatchNorm is undefined there.

    Returns name, readout and score of each layer.

    Raises:
        ValueError: for fewer than one epoch, or a source without batches.
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    if source.steps < 1:
        raise ValueError("the source has no training batch (steps = 0)")
    device = next(network.parameters()).device
    with evaluating(network):
        features = layer_features(network, input_shape)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        readouts = [make(read).to(device) for read in features]
        trained = _train(network, readouts, source, epochs, lr, label, bars)
    tested = _test(network, readouts, source, label, bars)
    parts = (trained.module_losses, trained.module_accuracies, tested.module_losses, tested.module_accuracies)
    scores = [Score(*score) for score in zip(*parts, strict=True)]
    return list(zip(layer_names(network), readouts, scores, strict=True))


def _train(
    network: nn.Module, readouts: Sequence[Readout], source: Source, epochs: int, lr: float, label: str, bars: bool
) -> Reading:
    device = next(network.parameters()).device
    optimizers = [readout.optimizer(lr) for readout in readouts]
    for readout, optimizer in zip(readouts, optimizers, strict=True):
        readout.train()
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    sums = EpochSums(len(readouts), device)
    total, step = epochs * source.steps, 0
    with evaluating(network), progress_bar(total, label, "step", bars) as bar:
        for epoch in range(1, epochs + 1):
            sums = EpochSums(len(readouts), device)
            for images, labels in source.train(epoch):
                fraction = (1 + math.cos(math.pi * min(step, total) / total)) / 2
                step += 1
                bar.update()
                if len(images) > 1:
                    images, labels = images.to(device), labels.to(device)
                    outcomes = _step(network, readouts, optimizers, images, labels, fraction)
                    sums.add(_result(outcomes, len(images)), len(images))
    return sums.read()


def _step(
    network: nn.Module,
    readouts: Sequence[Readout],
    optimizers: Sequence[torch.optim.Optimizer],
    images: Tensor,
    labels: Tensor,
    fraction: float,
) -> list[tuple[Tensor, Tensor]]:
    outcomes = []
    outputs = layer_outputs(network, images)
    for readout, optimizer, h in zip(readouts, optimizers, outputs, strict=True):
        with torch.enable_grad():
            loss, correct = readout.outcome(h, images, labels)
            optimizer.zero_grad()
            loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = fraction * group["initial_lr"]
        optimizer.step()
        outcomes.append((loss.detach(), correct))
    return outcomes


def _test(network: nn.Module, readouts: Sequence[Readout], source: Source, label: str, bars: bool) -> Reading:
    device = next(network.parameters()).device
    sums = EpochSums(len(readouts), device)
    with evaluating(network, *readouts), progress_bar(None, f"{label}, test", "batch", bars) as bar:
        for images, labels in source.test():
            images, labels = images.to(device), labels.to(device)
            outputs = layer_outputs(network, images)
            found = [r.outcome(h, images, labels) for r, h in zip(readouts, outputs, strict=True)]
            sums.add(_result(found, len(images)), len(images))
            bar.update()
    return sums.read()

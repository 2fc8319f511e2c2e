"""How far a run has come: the plain numbers of its checkpoint, its progress bars, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..progress_bar import progress_bar
from .logs import peak_bytes
from .metrics import EpochSums, Reading

# A bar as long as there is room, the rate, and what is left of it; text() adds what is left of the run.
_BAR = "{desc} |{bar}| {rate_noinv_fmt}, {remaining} left{postfix}"
_WIDE = 110  # columns in which a bar has room for more figures


@dataclass(frozen=True)
class Summary:
    """The results of a finished run; the best epoch is chosen on the test set, as AugLocal's code does.

    It is chosen by accuracy, or by mIoU of masks, whose accuracies are over pixels. ``waiting`` is the fraction of
    ``train_seconds`` in which steps waited for their batch.
    """

    last_accuracy: float
    best_accuracy: float
    best_epoch: int
    train_seconds: float
    waiting: float
    peak_bytes: int
    last_miou: float | None = None
    best_miou: float | None = None


@dataclass
class Progress:
    """The part of a run's state that is plain numbers."""

    epochs: int = 0
    last_accuracy: float = 0.0
    best_accuracy: float = 0.0
    best_epoch: int = 0
    train_seconds: float = 0.0
    waiting_seconds: float = 0.0
    last_miou: float | None = None
    best_miou: float | None = None

    @property
    def metrics(self) -> tuple[float, float]:
        """The task's own, of the last and of the best epoch."""
        if self.last_miou is None or self.best_miou is None:
            return self.last_accuracy, self.best_accuracy
        return self.last_miou, self.best_miou

    def finish_epoch(self, sums: EpochSums, test: Reading) -> None:
        """Count an epoch of these sums, after which the network is as ``test`` says on the test images."""
        self.epochs, self.last_accuracy, self.last_miou = self.epochs + 1, test.accuracy, test.miou
        self.train_seconds += sums.seconds
        self.waiting_seconds += sums.waiting
        if self.best_epoch == 0 or test.metric > self.metrics[1]:
            self.best_accuracy, self.best_miou, self.best_epoch = test.accuracy, test.miou, self.epochs

    def summary(self, device: torch.device) -> Summary:
        """Of a run with an epoch at least."""
        return Summary(
            self.last_accuracy,
            self.best_accuracy,
            self.best_epoch,
            self.train_seconds,
            self.waiting_seconds / self.train_seconds,
            peak_bytes(device),
            self.last_miou,
            self.best_miou,
        )


def image_bar(images: int, description: str, show: bool, initial: int = 0) -> Any:
    """A progress bar over images with their rate and the time left."""
    return progress_bar(images, description, " images", show, initial, _BAR)


def bar_text(bar: Any, seconds_left: float, loss: float, reading: Reading, metric: str, device: torch.device) -> str:
    """What a bar says of the run: its time left, the network's loss and accuracy; more where there is room."""
    parts = [f"run {bar.format_interval(seconds_left)}", f"loss {loss:.3f}"]
    if (bar.ncols or 0) < _WIDE:
        return ", ".join([*parts, f"{reading.metric:.1%}"])
    parts += [f"{metric} {reading.metric:.1%}", f"peak {peak_bytes(device) / 1e6:,.0f} MB"]
    return ", ".join(parts)

"""How far a run has come: the plain numbers of its checkpoint, its progress bars, and what it comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..progress_bar import progress_bar
from .logs import peak_bytes
from .measures import FORMS, Form
from .metrics import EpochSums, Reading

# A bar as long as there is room, the rate, and what is left of it; text() adds what is left of the run.
_BAR = "{desc} |{bar}| {rate_noinv_fmt}, {remaining} left{postfix}"
_WIDE = 110  # columns in which a bar has room for more figures


@dataclass(frozen=True)
class Summary:
    """The results of a finished run; the best epoch is chosen on the test set, as AugLocal's code does.

    It is chosen by accuracy; by mIoU of masks, whose accuracies are over pixels; of text, whose accuracies are over
    tokens, by bits per byte or perplexity. What a run does not measure is None. ``waiting`` is the fraction of
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
    last_bits_per_byte: float | None = None
    best_bits_per_byte: float | None = None
    last_perplexity: float | None = None
    best_perplexity: float | None = None

    def measured(self) -> list[tuple[Form, float, float]]:
        """What was measured, of the last and of the best epoch; the task's own last."""
        return _measured(self)


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
    last_bits_per_byte: float | None = None
    best_bits_per_byte: float | None = None
    last_perplexity: float | None = None
    best_perplexity: float | None = None

    def finish_epoch(self, sums: EpochSums, test: Reading) -> None:
        """Count an epoch of these sums, after which the network is as ``test`` says on the test images."""
        self.epochs += 1
        self.train_seconds += sums.seconds
        self.waiting_seconds += sums.waiting
        (form, value), before = test.metric, _measured(self)
        best = not before or form.better(value, before[-1][2])
        for each, found in test.of_network().items():
            setattr(self, f"last_{each.column}", found)
            if best:
                setattr(self, f"best_{each.column}", found)
        if best:
            self.best_epoch = self.epochs

    def measured(self) -> list[tuple[Form, float, float]]:
        """What was measured, of the last and of the best epoch; the task's own last."""
        return _measured(self)

    def summary(self, device: torch.device) -> Summary:
        """Of a run with an epoch at least."""
        values = {
            name: getattr(self, name) for form in FORMS for name in (f"last_{form.column}", f"best_{form.column}")
        }
        return Summary(
            best_epoch=self.best_epoch,
            train_seconds=self.train_seconds,
            waiting=self.waiting_seconds / self.train_seconds,
            peak_bytes=peak_bytes(device),
            **values,
        )


def _measured(numbers: Summary | Progress) -> list[tuple[Form, float, float]]:
    found = [(f, getattr(numbers, f"last_{f.column}"), getattr(numbers, f"best_{f.column}")) for f in FORMS]
    return [(form, last, best) for form, last, best in found if last is not None and numbers.best_epoch]


def unit_bar(total: int, unit: str, description: str, show: bool, initial: int = 0) -> Any:
    """A progress bar over images or tokens with their rate and the time left."""
    return progress_bar(total, description, f" {unit}", show, initial, _BAR)


def bar_text(bar: Any, seconds_left: float, loss: float, reading: Reading, device: torch.device) -> str:
    """What a bar says of the run: its time left, the network's loss and measure; more where there is room."""
    form, value = reading.metric
    parts = [f"run {bar.format_interval(seconds_left)}", f"loss {loss:.3f}"]
    if (bar.ncols or 0) < _WIDE:
        return ", ".join([*parts, form.text(value, 1)])
    parts += [f"{form.name} {form.text(value, 1)}", f"peak {peak_bytes(device) / 1e6:,.0f} MB"]
    return ", ".join(parts)

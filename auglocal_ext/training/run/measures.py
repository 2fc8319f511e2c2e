"""What a run measures beside its losses: accuracy, mIoU of masks, perplexity and bits per byte of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ...tasks import LanguageModelling, Segmentation, Task
from ..data.text_files import BYTES

#: Values of K modules (K,), float64, of their counts (K, ...) and what these are out of.
Measuring = Callable[[Tensor, float], Tensor]


@dataclass(frozen=True)
class Form:
    """How a measure is named and written.

    Attributes:
        column: in a log, after ``train_`` and ``test_``.
        modules: its column of the values of all modules.
        name: for a person.
        short: the same in the table of epochs.
        percent: whether values are fractions.
        rising: whether more is better.
    """

    column: str
    modules: str
    name: str
    short: str
    percent: bool = True
    rising: bool = True

    def text(self, value: float, digits: int = 2) -> str:
        """A value for a person; a fraction in percent with so many digits, another number with two more."""
        return f"{value:.{digits}%}" if self.percent else f"{value:.{digits + 2}f}"

    def better(self, value: float, than: float) -> bool:
        """Whether ``value`` is the better one of the two."""
        return value > than if self.rising else value < than


ACCURACY = Form("accuracy", "module_accuracies", "accuracy", "accuracy")
MIOU = Form("miou", "module_mious", "mIoU", "mIoU")
PERPLEXITY = Form("perplexity", "module_perplexities", "perplexity", "perplex.", percent=False, rising=False)
BITS_PER_BYTE = Form("bits_per_byte", "module_bits_per_byte", "bits per byte", "bits/B", percent=False, rising=False)

#: All that a log may have, in its order.
FORMS = (ACCURACY, MIOU, BITS_PER_BYTE, PERPLEXITY)


def measures_of(task: Task | None, bytes_per_token: float = 1.0) -> dict[Form, Measuring]:
    """What is measured of a task, the task's own last; of None the accuracy.

    Of text that is bits per byte where tokens are bytes, else perplexity.
    """
    if isinstance(task, Segmentation):
        return {ACCURACY: task.pixel_accuracy, MIOU: task.measure}
    if isinstance(task, LanguageModelling):
        in_bits = partial(task.bits_per_byte, bytes_per_token=bytes_per_token)
        found: dict[Form, Measuring] = {ACCURACY: task.accuracy, BITS_PER_BYTE: in_bits}
        return found if task.outputs == BYTES and bytes_per_token == 1 else found | {PERPLEXITY: task.measure}
    return {ACCURACY: _accuracy if task is None else task.measure}


def _accuracy(counts: Tensor, counted: float) -> Tensor:
    shares = counts.double() / max(1.0, counted)
    return shares.masked_fill(counts < 0, math.nan)

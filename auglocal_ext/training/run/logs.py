"""What a run tells: a CSV row per epoch, a table on the terminal, TensorBoard scalars, and its peak memory."""

from __future__ import annotations

import csv
import io
import math
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError
from .log_file import read_rows
from .measures import ACCURACY, FORMS, Form
from .metrics import Reading
from .writing import replaced, to


@dataclass(frozen=True)
class EpochRow:
    """One row of ``log.csv``. Accuracies are fractions, ``seconds`` those spent on training batches alone.

    ``train_loss`` and ``train_accuracy`` are the network's own, those of its classifier, which the last local module
    trains; they compare with ``test_loss`` and ``test_accuracy``. They are means over the epoch's images, augmented and
    in training mode, while the weights changed. (``train_loss`` is nan where a rule gives the classifier's loss the
    weight 0.) ``local_loss_sum`` is what a step differentiates: the sum of ``module_losses``, the weighted local losses
    of the rule. Backpropagation is one module, whose loss is the network's.

    ``module_accuracies`` are those of each module's own classifier on the same images, nan where it has none; the last
    module's is ``train_accuracy``. Both per-module columns are one number per local module, separated by spaces in the
    file. ``waiting`` is the fraction of ``seconds`` in which steps waited for their batch: on CUDA the device's time
    from the end of a step to the next batch being ready on it, on the CPU the time it took to make the batches.
    ``peak_bytes`` is the peak since the start: allocated CUDA memory, or on the CPU the process's resident set.

    What a run does not measure is None and not in the file. Of masks, accuracies are over the pixels that count, and
    there is the mean intersection over union of the classes. Of text they are over tokens, and there are bits per byte
    and, unless tokens are bytes, perplexity; the rate is in tokens.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    local_loss_sum: float
    test_loss: float
    test_accuracy: float
    images_per_second: float | None
    seconds: float
    waiting: float
    peak_bytes: int
    module_losses: tuple[float, ...]
    module_accuracies: tuple[float, ...]
    train_miou: float | None = None
    test_miou: float | None = None
    module_mious: tuple[float, ...] | None = None
    tokens_per_second: float | None = None
    train_bits_per_byte: float | None = None
    test_bits_per_byte: float | None = None
    module_bits_per_byte: tuple[float, ...] | None = None
    train_perplexity: float | None = None
    test_perplexity: float | None = None
    module_perplexities: tuple[float, ...] | None = None


_PER_MODULE = {"module_losses": "module_loss"} | {form.modules: f"module_{form.column}" for form in FORMS}

UNITS = IMAGES, TOKENS = "images", "tokens"
"""What the rate of a run counts."""


def measured(train: Reading, test: Reading) -> dict[str, Any]:
    """The columns of what is measured in an epoch; None in those of what is not."""
    of_train, of_test = train.of_network(), test.of_network()
    columns: dict[str, Any] = {}
    for form in FORMS:
        columns |= {f"train_{form.column}": of_train.get(form), f"test_{form.column}": of_test.get(form)}
        columns[form.modules] = train.measured.get(form)
    return columns


def rates(unit: str, rate: float) -> dict[str, Any]:
    """The columns of the rate; None in those of other units."""
    return {f"{each}_per_second": rate if each == unit else None for each in UNITS}


def columns(forms: Collection[Form], unit: str) -> list[str]:
    """Those of ``log.csv``, of a run that measures ``forms`` and counts its rate in ``unit``."""
    others = {f"{each}_per_second" for each in UNITS if each != unit}
    for form in FORMS:
        if form not in forms:
            others |= {f"train_{form.column}", f"test_{form.column}", form.modules}
    return [field.name for field in fields(EpochRow) if field.name not in others]


class CsvLog:
    """``log.csv``; opening it for a run that goes on after ``epoch`` drops the rows of later epochs.

    ``names`` are its columns, those of images with classes if they are not given.

    Raises CheckpointError if a log to go on with has other columns than :class:`EpochRow`.
    """

    def __init__(self, path: Path, epoch: int, names: Sequence[str] | None = None):
        self.path = path
        names = columns((ACCURACY,), IMAGES) if names is None else list(names)
        kept: list[dict[str, str]] = []
        if epoch and path.is_file():
            found, rows = read_rows(path)
            if found != names:
                raise CheckpointError(
                    f"{path}: its columns are {', '.join(found or ['none'])}; expected {', '.join(names)}. Another "
                    "version wrote it: move it away to go on without its epochs"
                )
            kept = [row for row in rows if int(row["epoch"]) <= epoch]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, names)
        writer.writeheader()
        writer.writerows(kept)
        with replaced(path) as file:
            file.write(text.getvalue().encode())

    def add(self, row: EpochRow) -> None:
        values = {name: value for name, value in asdict(row).items() if value is not None}
        values |= {name: " ".join(map(repr, values[name])) for name in _PER_MODULE if name in values}
        with to(self.path), self.path.open("a", newline="") as file:
            csv.writer(file).writerow(values.values())


class TensorBoardLog:
    """Scalars per epoch below ``folder``; ``note`` says why there are none if tensorboard does not import."""

    def __init__(self, folder: Path, epoch: int):
        self.note: str | None = None
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception as error:  # a half-installed tensorboard fails in many ways, none worth losing a run for
            self.note = f"no TensorBoard log ({error}): pip install tensorboard"
            return
        try:
            with _unprinted():
                self._writer = SummaryWriter(str(folder), purge_step=epoch + 1)
        except OSError as error:
            self.note = _no_board(folder, error)
        self._folder = folder

    def add(self, row: EpochRow) -> None:
        if self._writer is None:
            return
        try:
            with _unprinted():
                self._write(row)
        except OSError as error:  # no reason to lose a run
            self.close()
            self.note, self._writer = _no_board(self._folder, error), None

    def _write(self, row: EpochRow) -> None:
        for name, value in asdict(row).items():
            if name != "epoch" and name not in _PER_MODULE and value is not None:
                # train/loss and test/loss, so that TensorBoard groups the two splits.
                tag = name.replace("_", "/", 1) if name.startswith(("train_", "test_")) else name
                self._writer.add_scalar(tag, value, row.epoch)
        for name, tag in _PER_MODULE.items():
            for module, value in enumerate(getattr(row, name) or ()):
                if not math.isnan(value):
                    self._writer.add_scalar(f"{tag}/{module}", value, row.epoch)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            with suppress(OSError), _unprinted():
                self._writer.close()


@contextmanager
def _unprinted() -> Iterator[None]:
    """Within it Python prints no traceback of TensorBoard's writing thread, which hands its error to the caller."""
    printed, ended = threading.excepthook, threading.Event()

    def hook(failed: threading.ExceptHookArgs) -> None:
        if isinstance(failed.exc_value, OSError) and type(failed.thread).__module__.startswith("tensorboard."):
            ended.set()
        else:
            printed(failed)

    threading.excepthook = hook
    try:
        yield
    except OSError:
        ended.wait(0.5)  # the thread ends after it has handed on its error
        raise
    finally:
        threading.excepthook = printed


def _no_board(folder: Path, error: OSError) -> str:
    return f"no TensorBoard log: {folder} cannot be written: {error.strerror or error}"


def peak_bytes(device: torch.device) -> int:
    """Peak of allocated CUDA memory in bytes; on the CPU the process's peak resident set, data included.

    0 where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _columns(form: Form, unit: str, modules: int) -> dict[str, tuple[int, str, str, Callable[[Any], str]]]:
    """Of each column that the table shows, its width, the two lines above it, and how a value is written."""

    def loss(value: float) -> str:
        return f"{value:.4f}"

    shown: dict[str, tuple[int, str, str, Callable[[Any], str]]] = {
        "lr": (8, "", "lr", "{:.3g}".format),
        "train_loss": (7, "train", "loss", loss),
        f"train_{form.column}": (8, "train", form.short, form.text),
        "local_loss_sum": (12, "sum of local", "losses", loss),
        "test_loss": (7, "test", "loss", loss),
        f"test_{form.column}": (8, "test", form.short, form.text),
        f"{unit}_per_second": (8, "", f"{unit}/s", "{:,.0f}".format),
    }
    if modules == 1:
        del shown["local_loss_sum"]
    return shown


class EpochTable:
    """Epochs as lines of at most 80 columns for the terminal, with a heading above the first.

    Args:
        epochs: of the whole run.
        form: the measure that is shown.
        unit: what the rate counts.
        modules: local modules; the sum of their losses is shown where there is more than one.
    """

    def __init__(self, epochs: int, form: Form, modules: int, unit: str = IMAGES):
        self._epochs = epochs
        self._first = max(5, len(f"{epochs}/{epochs}"))
        self._columns = _columns(form, unit, modules)

    def heading(self) -> str:
        """Two lines."""
        upper = [" " * self._first, *(above.rjust(width) for width, above, _, _ in self._columns.values())]
        names = [name.rjust(width) for width, _, name, _ in self._columns.values()]
        return "  ".join(upper).rstrip() + "\n" + "  ".join(["epoch".rjust(self._first), *names])

    def line(self, row: EpochRow) -> str:
        """The line of an epoch."""
        cells = [write(getattr(row, name)).rjust(width) for name, (width, _, _, write) in self._columns.items()]
        return "  ".join([f"{row.epoch}/{self._epochs}".rjust(self._first), *cells])

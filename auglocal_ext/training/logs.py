"""What a run tells: a progress bar, a CSV row per epoch, TensorBoard scalars, and its peak memory."""

from __future__ import annotations

import csv
import math
import os
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class EpochRow:
    """One row of ``log.csv``. Accuracies are fractions, ``seconds`` those spent on training batches alone.

    ``waiting`` is the fraction of these seconds in which steps waited for their batch: on CUDA the device's time from
    the end of a step to the next batch being ready on it, on the CPU the time it took to make the batches.

    ``train_loss`` is the mean over the images of the loss that was differentiated: for a local rule the sum
    of ``module_losses``. ``module_accuracies`` are those of each module's own classifier on the same images, nan where
    it has none; the last module's is ``train_accuracy``. Both are one number per local module, separated by spaces in
    the file. ``peak_bytes`` is the peak since the start: allocated CUDA memory, or on the CPU the process's resident
    set.
    """

    epoch: int
    lr: float
    train_loss: float
    train_accuracy: float
    test_loss: float
    test_accuracy: float
    images_per_second: float
    seconds: float
    waiting: float
    peak_bytes: int
    module_losses: tuple[float, ...]
    module_accuracies: tuple[float, ...]


_PER_MODULE = ("module_losses", "module_accuracies")


class CsvLog:
    """``log.csv``; opening it for a run that goes on after ``epoch`` drops the rows of later epochs."""

    def __init__(self, path: Path, epoch: int):
        self.path = path
        names = [field.name for field in fields(EpochRow)]
        kept: list[dict[str, str]] = []
        if epoch and path.is_file():
            with path.open(newline="") as file:
                # A row cut short by a crash has no last column.
                kept = [row for row in csv.DictReader(file) if row.get(names[-1]) and int(row["epoch"]) <= epoch]
        temporary = path.with_suffix(".partial")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, names, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        os.replace(temporary, path)

    def add(self, row: EpochRow) -> None:
        values = asdict(row)
        values |= {name: " ".join(map(repr, values[name])) for name in _PER_MODULE}
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(values.values())


class TensorBoardLog:
    """Scalars per epoch below ``folder``; ``note`` says why there are none if tensorboard does not import."""

    def __init__(self, folder: Path, epoch: int):
        self.note: str | None = None
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except Exception as error:  # a half-installed tensorboard fails in many ways, none worth losing a run for
            self.note = f"no TensorBoard log ({error}); pip install 'auglocal_ext[train]'"
            return
        self._writer = SummaryWriter(str(folder), purge_step=epoch + 1)

    def add(self, row: EpochRow) -> None:
        if self._writer is None:
            return
        for name, value in asdict(row).items():
            if name != "epoch" and name not in _PER_MODULE:
                # train/loss and test/loss, so that TensorBoard groups the two splits.
                tag = name.replace("_", "/", 1) if name.startswith(("train_", "test_")) else name
                self._writer.add_scalar(tag, value, row.epoch)
        for module, loss in enumerate(row.module_losses):
            self._writer.add_scalar(f"module_loss/{module}", loss, row.epoch)
        for module, accuracy in enumerate(row.module_accuracies):
            if not math.isnan(accuracy):
                self._writer.add_scalar(f"module_accuracy/{module}", accuracy, row.epoch)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


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


def progress_bar(total: int | None, description: str, unit: str, show: bool, initial: int = 0) -> Any:
    """A tqdm bar on standard error, which stays silent where that is no terminal, or unless ``show``."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        initial=initial,
        desc=description,
        unit=unit,
        unit_scale=True,
        disable=None if show else True,
        dynamic_ncols=True,
        leave=False,
    )


def describe(row: EpochRow, epochs: int, metric: str) -> str:
    """One line for the terminal; ``metric`` is what the task calls what it counts."""
    return (
        f"epoch {row.epoch}/{epochs}  lr {row.lr:.4g}  "
        f"train loss {row.train_loss:.4f} {metric} {row.train_accuracy:.2%}  "
        f"test loss {row.test_loss:.4f} {metric} {row.test_accuracy:.2%}  {row.images_per_second:,.0f} images/s  "
        f"waiting for data {row.waiting:.1%}  peak {row.peak_bytes / 1e6:,.0f} MB"
    )

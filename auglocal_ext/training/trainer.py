"""A run: epochs of steps, each followed by an evaluation, a log row and a checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..models import input_shape
from ..tasks import Classification
from . import checkpoint
from .batches import Batches, make_batches
from .config import TrainConfig, differences, pick_device, resolve, to_dict
from .data import ImageArrays, ImageFiles, default_workers, load_data
from .errors import CheckpointError, DivergedError, Interrupted, SettingsError
from .interrupt import InterruptRequest
from .learner import autocast, make_learner
from .logs import CsvLog, EpochRow, TensorBoardLog, describe, peak_bytes, progress_bar
from .metrics import EpochSums, Reading, StepResult
from .mixing import MixedBatches
from .prefetch import make_feed
from .schedule import learning_rate
from .versions import versions

READ_EVERY = 50
"""Steps between two readings of the loss on CUDA, where a reading waits for the device."""

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Summary:
    """What a finished run comes to; the best accuracy is chosen on the test set, as AugLocal's code does."""

    last_accuracy: float
    best_accuracy: float
    best_epoch: int
    train_seconds: float
    peak_bytes: int


@dataclass
class _Progress:
    """The part of a run's state that is plain numbers."""

    epochs: int = 0
    last_accuracy: float = 0.0
    best_accuracy: float = 0.0
    best_epoch: int = 0
    train_seconds: float = 0.0


class Trainer:
    """Trains ``config.network`` by ``config.rule`` on the images in ``config.data``.

    ``data`` stands in for loading them; ``say`` receives the lines for the terminal; ``bars`` shows progress
    bars where standard error is a terminal. ``network`` is what is trained, ``config`` the resolved settings.

    Files in ``config.output``: config.json (settings, data, versions), log.csv, tensorboard/, checkpoint.pt
    (after each epoch and on Ctrl-C). Raises a TrainingError, before anything is written, for data or settings
    that do not work.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: ImageArrays | ImageFiles | None = None,
        *,
        bars: bool = True,
        say: Callable[[str], None] = print,
    ):
        self._bars, self._say = bars, say
        self.device = pick_device(config.device)
        self.data = load_images(config, bars) if data is None else data
        self.config = resolve(config, self.data.name, isinstance(self.data, ImageFiles))
        self.output = Path(self.config.output).expanduser()

        torch.manual_seed(self.config.seed)
        self._recipe = self.config.recipe_values
        self._task = Classification(len(self.data.classes))
        self._batches: Batches = make_batches(
            self.data,
            self._recipe.augmentation,
            batch_size=self._recipe.batch_size,
            seed=self.config.seed,
            device=self.device,
            channels_last=self.config.channels_last,
            workers=default_workers() if self.config.workers is None else self.config.workers,
        )
        if self.config.mixes:
            self._batches = MixedBatches(
                self._batches,
                self._task.num_classes,
                mixup=self.config.mixup or 0.0,
                cutmix=self.config.cutmix or 0.0,
                seed=self.config.seed,
            )
        self._feed = make_feed(self.device)
        self._learner = make_learner(self.config, self.data.input_shape, self._task, self.device)
        self.network = self._learner.network
        self._sums = EpochSums(self._learner.modules, self.device)
        self._done = _Progress()
        self._resumed = False
        self._interrupt = InterruptRequest()

    def fit(self) -> Summary:
        """Train until ``config.epochs`` epochs are done.

        Raises Interrupted after Ctrl-C, with the state of that moment in the checkpoint; DivergedError if the
        loss is no longer finite; SettingsError if the output folder already holds another run.
        """
        if not self._resumed and (self.output / CHECKPOINT).exists():
            raise SettingsError(f"{self.output} holds a run: continue it with --resume, or choose another --output")
        self.output.mkdir(parents=True, exist_ok=True)
        (self.output / "config.json").write_text(json.dumps(self.describe(), indent=2) + "\n")
        table = CsvLog(self.output / "log.csv", self._done.epochs)
        board = TensorBoardLog(self.output / "tensorboard", self._done.epochs)
        if board.note:
            self._say(board.note)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            with self._interrupt:
                first = self._done.epochs + 1
                while self._done.epochs < self._recipe.epochs:
                    row = self._epoch()
                    if row.epoch == first and (outcome := self._learner.outcome()):
                        self._say(outcome)
                    table.add(row)
                    board.add(row)
                    self.save()
                    self._say(describe(row, self._recipe.epochs, self._task.metric))
                    if self._done.epochs < self._recipe.epochs:
                        self._stop_if_asked()
        finally:
            board.close()
        done = self._done
        return Summary(
            done.last_accuracy,
            done.best_accuracy,
            done.best_epoch,
            done.train_seconds,
            peak_bytes(self.device),
        )

    def _epoch(self) -> EpochRow:
        epoch = self._done.epochs + 1
        lr = learning_rate(epoch, self._recipe.epochs, self._recipe.lr, self._recipe.warmup)
        for group in self._learner.optimizer.param_groups:
            group["lr"] = lr
        train = self._train(epoch)
        test = self.evaluate()
        self._stop_if_asked()

        done, sums = self._done, self._sums
        done.epochs, done.last_accuracy = epoch, test.accuracy
        done.train_seconds += sums.seconds
        if test.accuracy > done.best_accuracy or done.best_epoch == 0:
            done.best_accuracy, done.best_epoch = test.accuracy, epoch
        self._sums = EpochSums(self._learner.modules, self.device)
        return EpochRow(
            epoch=epoch,
            lr=lr,
            train_loss=train.loss,
            train_accuracy=train.accuracy,
            test_loss=test.loss,
            test_accuracy=test.accuracy,
            images_per_second=sums.images / sums.seconds,
            seconds=sums.seconds,
            waiting=sums.waiting / sums.seconds,
            peak_bytes=peak_bytes(self.device),
            module_losses=train.module_losses,
            module_accuracies=train.module_accuracies,
        )

    def _train(self, epoch: int) -> Reading:
        """The steps of the epoch that are still to do."""
        sums = self._sums
        every = 1 if self.device.type == "cpu" else READ_EVERY
        before, started = sums.seconds, time.perf_counter()
        self.network.train()
        with self._bar(f"epoch {epoch}/{self._recipe.epochs}", self.data.train_count, sums.images) as bar:
            for images, labels in self._feed(self._batches.train(epoch, sums.steps)):
                sums.add(self._learner.step(images, labels), len(labels))
                if sums.steps % every == 0:
                    reading = self._read(epoch)
                    bar.set_postfix_str(
                        f"loss {reading.loss:.3f}, {self._task.metric} {reading.accuracy:.1%}, "
                        f"peak {peak_bytes(self.device) / 1e6:,.0f} MB",
                        refresh=False,
                    )
                bar.update(len(labels))
                if self._interrupt.requested:
                    break
        reading = self._read(epoch)  # waits for the last step, which belongs to the time
        sums.seconds = before + time.perf_counter() - started
        self._stop_if_asked()
        return reading

    def _read(self, epoch: int) -> Reading:
        """Losses and waits so far; on CUDA the host waits for the device here and nowhere else."""
        reading = self._sums.read()
        self._sums.waiting += self._feed.waited()
        if not math.isfinite(reading.loss):
            raise DivergedError(
                f"the loss is {reading.loss} in epoch {epoch}: lower --lr, lengthen --warmup or turn off --amp "
                f"(the last finished epoch is in {self.output / CHECKPOINT})"
            )
        return reading

    def evaluate(self) -> Reading:
        """Mean cross-entropy and top-1 accuracy of the network alone, in eval mode, over the test images."""
        sums = EpochSums(1, self.device)
        self.network.eval()
        with torch.no_grad(), self._bar("test", self.data.test_count) as bar:
            for images, labels in self._batches.test():
                with autocast(self.config.amp, self.device):
                    logits = self.network(images)
                scored = self._task.score(logits.float(), labels)
                sums.add(StepResult.of_one_module(scored, self._task.counted(labels)), len(labels))
                bar.update(len(labels))
                if self._interrupt.requested:
                    break
        return sums.read()

    def save(self) -> None:
        """Write the checkpoint: everything that ``resume`` needs to go on with the very next step."""
        state = {
            "settings": to_dict(self.config),
            "data": self._data_facts(),
            "network": self.network.state_dict(),
            "learner": self._learner.state_dict(),
            "progress": asdict(self._done),
            "epoch_sums": self._sums.state_dict(),
            "batches": self._batches.state_dict(),
            "random": checkpoint.random_state(self.device),
            "versions": versions(),
        }
        self.output.mkdir(parents=True, exist_ok=True)
        checkpoint.save(state, self.output / CHECKPOINT)

    def resume(self) -> None:
        """Take up the run in ``config.output``; CheckpointError if it has other settings or data."""
        path = self.output / CHECKPOINT
        state = checkpoint.load(path)
        changed = differences(state["settings"], to_dict(self.config))
        facts = self._data_facts()
        changed += [f"data: {k} was {v!r}, now {facts[k]!r}" for k, v in state["data"].items() if facts[k] != v]
        if changed:
            raise CheckpointError(f"{path} belongs to a run with other settings:\n  " + "\n  ".join(changed))
        self.network.load_state_dict(state["network"])
        self._learner.load_state_dict(state["learner"])
        self._done = _Progress(**state["progress"])
        self._sums.load_state_dict(state["epoch_sums"])
        self._batches.load_state_dict(state["batches"])
        checkpoint.restore_random_state(state["random"], self.device)
        self._resumed = True

    def plan(self) -> str | None:
        """How the steps will run, for the terminal; None where there is nothing to choose."""
        return self._learner.plan()

    def describe(self) -> dict[str, Any]:
        """Settings, data and versions, as config.json holds them."""
        facts = self._data_facts() | {"local_modules": self._learner.modules}
        threads = torch.get_num_threads()
        return {"settings": to_dict(self.config), "data": facts, "versions": versions(), "threads": threads}

    def _data_facts(self) -> dict[str, Any]:
        return {
            "classes": list(self.data.classes),
            "train_images": self.data.train_count,
            "test_images": self.data.test_count,
            "input_shape": list(self.data.input_shape),
            "in_memory": isinstance(self.data, ImageArrays),
        }

    def _stop_if_asked(self) -> None:
        if self._interrupt.requested:
            self.save()
            raise Interrupted(
                f"stopped in epoch {self._done.epochs + 1} after {self._sums.steps} of {self._batches.steps} "
                f"steps; saved {self.output / CHECKPOINT}"
            )

    def _bar(self, description: str, total: int, initial: int = 0) -> Any:
        return progress_bar(total, description, "image", self._bars, initial)


def load_images(config: TrainConfig, bars: bool) -> ImageArrays | ImageFiles:
    """The images that ``config`` names."""
    return load_data(
        config.data,
        config.dataset,
        image_size=config.image_size,
        streamed_size=input_shape(config.network)[1],
        train_images=config.train_images,
        seed=config.seed,
        workers=config.workers,
        progress=bars,
    )

"""A run: epochs of steps, each followed by an evaluation, a log row and a checkpoint."""

from __future__ import annotations

import json
import math
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from ...nn import is_sharded
from ...step import MemoryPlan
from ..config.schedule import learning_rate, rate_of_step, warmup_of
from ..config.train_config import TrainConfig, pick_device, resolve, to_dict
from ..data.batches import Batches
from ..data.datasets import ImageArrays
from ..data.order import Part, mixed_seed
from ..data.prefetch import Batch, make_feed
from ..data.text import NAME as TEXT
from ..errors import CheckpointError, DivergedError, Interrupted, OutputError, SettingsError, WorkerError
from ..interrupt import InterruptRequest
from ..paths import user_path
from . import resuming, saving, stored
from .curves import draw_run, read_curves
from .kind import Data
from .kinds import kind_of
from .learners import make_learner, try_network
from .logs import EpochRow, EpochTable, columns, measured, peak_bytes, rates
from .metrics import EpochSums, Reading, StepResult
from .processes import Alone
from .progress import Progress, Summary, bar_text, unit_bar
from .records import Records
from .run_folder import refuse_among_data
from .schedule_picture import Shares, record_schedule
from .versions import versions
from .writing import replaced

READ_EVERY = 50
"""Steps between two readings of the loss on CUDA, where a reading waits for the device."""

DRAW_EVERY = 30.0
"""Seconds between two drawings of the learning curves while a run goes on; one takes 0.2 to 1 s of a CPU core."""

CHECKPOINT, CURVES, SCHEDULE = saving.FILE, "curves.png", "schedule.png"


class Trainer:
    """Trains ``config.network`` by ``config.rule`` on the images, or the text, in ``config.data``.

    ``data`` stands in for loading them; ``say`` receives the lines for the terminal; ``bars`` shows progress
    bars where standard error is a terminal. ``network`` is what is trained, ``config`` the resolved settings.

    ``team`` is this process among those of ``config.stages`` and ``config.replicas``, as
    :meth:`auglocal_ext.training.run.processes.Launch.join` makes it. All of them call the same methods; only the first
    prints and writes, except for its part of a checkpoint.

    Files in ``config.output``: config.json (settings, data, versions), log.csv, tensorboard/, checkpoint.pt (after each
    epoch and on Ctrl-C, always of finite weights; local modules of several processes write a folder checkpoint/),
    curves.png (redrawn at ends of epochs, every half minute at most, and when the run ends, is stopped or diverges),
    schedule.png (several processes on CPUs); of a text also samples.txt, and tokens.bin unless its tokens are the bytes
    of one file. Raises a TrainingError, before anything else is written, for data or settings that do not work, and
    before tokens are written for other data than those of the run in the folder.
    """

    def __init__(
        self,
        config: TrainConfig,
        data: Data | None = None,
        *,
        bars: bool = True,
        say: Callable[[str], None] = print,
        team: Alone | None = None,
    ):
        self.team = team = Alone(pick_device(config.device)) if team is None else team
        if (team.stages, team.replicas) != (config.stages, config.replicas):
            raise SettingsError(
                f"{config.stages} stages of {config.replicas} replicas are several processes, and this is one of "
                f"{team.size}: start them with torchrun --nproc-per-node N -m auglocal_ext train"
            )
        self._bars, self._say = bars and team.first, say if team.first else lambda line: None
        self.device = team.device
        self._kind = kind_of(config.network)
        self.data = self._load(config) if data is None else data
        self._kind.check(config, self.data.name)
        self.config = resolve(config, self.data.name, not isinstance(self.data, ImageArrays))
        self._left_open = {name for name in resuming.LAID_OUT if getattr(config, name) is None}
        self.output = user_path(self.config.output)

        torch.manual_seed(self.config.seed)
        self._recipe = self.config.recipe_values
        self._task = self._kind.task(self._data_facts())
        part = Part(team.replica, team.replicas, self.config.mixes and team.replicas > 1)
        self._batches: Batches = self._kind.batches(self.config, self.data, self._task, self.device, part)
        self._bytes_per_token = self._kind.bytes_per_token(self.data)
        self._sampler = self._kind.sampler(self.config, self.data)
        self._feed = make_feed(self.device)
        self._learner = make_learner(self.config, self.data.input_shape, self._task, self.device, team.mesh)
        self.network = self._learner.network
        self.stage_modules = team.everyone(self._learner.own)[:: team.replicas]
        if not team.first:
            torch.manual_seed(mixed_seed(self.config.seed, team.rank))  # for dropout
        self._sums = self._no_sums()
        self._done = Progress()
        self.resumed_after: str | None = None  # where a resumed run goes on, for the terminal
        self._epochs_before: int | None = None  # those of the run that is resumed
        self._stands_on: tuple[Any, ...] | None = None  # the checkpoint that holds the run
        self._images_seconds = 0.0  # in which this process made batches
        self.shares: list[Shares] | None = None
        self._interrupt = InterruptRequest(quiet=not team.first)
        self._saved: str | None = None  # what the checkpoint holds
        self._epoch_seconds: float | None = None  # of the last whole epoch in this process
        self._drawn = -math.inf

    def _load(self, config: TrainConfig) -> Data:
        """The data, after a run folder among it has been refused, and, if loading writes files, what cannot be made."""
        if not config.on_text or config.sample != 0:
            refuse_among_data(user_path(config.output), user_path(config.data), text=config.on_text)
        if (facts := self._kind.foreseen(config)) is not None:
            try_network(resolve(config, TEXT, streamed=True), tuple(facts["input_shape"]), self._kind.task(facts))
        refuse = partial(resuming.refuse_other_tokens, user_path(config.output))
        return self._kind.load(config, self._bars, self.team, refuse)

    @property
    def steps(self) -> int:
        """Steps in an epoch."""
        return self._batches.steps

    def fit(self) -> Summary:
        """Train until ``config.epochs`` epochs are done.

        Raises Interrupted after Ctrl-C or SIGTERM, with the state of that moment in the checkpoint; DivergedError if a
        loss, on training or on test images, or a weight is no longer finite, and OutputError if a file cannot be
        written, both with the checkpoint as it was before; SettingsError if the output folder already holds another
        run, is in use by another process, or cannot be made.
        """
        with self._interrupt, resuming.own_folder(self.output, self._stands_on, self.team):
            records = self._records() if self.team.first else None
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            try:
                self._epochs(records)
            except (Interrupted, DivergedError):
                self.draw()
                raise
            except OutputError as error:
                raise OutputError(f"{error} ({self._saved or 'nothing was saved'})") from error
            finally:
                if records is not None:
                    records.close()
            self.draw()
        if (times := self._learner.times) is not None:
            self.shares = self.team.everyone(Shares.of(times, self._images_seconds))
        return self._done.summary(self.device)

    def _records(self) -> Records:
        with replaced(self.output / "config.json") as file:
            file.write((json.dumps(self.describe(), indent=2) + "\n").encode())
        if self._sampler is not None:
            self._sampler.open(self.output, self._done.epochs)
        reading, unit = self._no_sums().read(), self._kind.unit
        lines = EpochTable(self._recipe.epochs, reading.metric[0], self._learner.modules, unit)
        return Records(self.output, self._done.epochs, columns(reading.measured, unit), lines, self._say)

    def _epochs(self, records: Records | None) -> None:
        """The epochs that are still to do."""
        first = self._done.epochs + 1
        while self._done.epochs < self._recipe.epochs:
            started, whole = time.perf_counter(), self._sums.steps == 0
            row = self._epoch()
            sample = self._sample(row.epoch)
            if records is not None:
                records.add(row)
            if sample is not None and self._sampler is not None and self.team.first:
                self._sampler.write(self.output, row.epoch, sample)
            self.save()
            if records is not None:
                records.show(row, self._learner.outcome())
            if sample is not None:
                self._say(f"\n{_quoted(sample)}\n")
            if row.epoch == first and (times := self._learner.times) is not None:
                record_schedule(self.output / SCHEDULE, self.team, times, self._title())
            if self._done.epochs < self._recipe.epochs:
                self._stop_if_asked()
                if time.perf_counter() - self._drawn > DRAW_EVERY:
                    self.draw()
            if whole:
                self._epoch_seconds = time.perf_counter() - started

    def _epoch(self) -> EpochRow:
        epoch = self._done.epochs + 1
        self._set_rate(epoch, self._sums.steps)
        train = self._train(epoch)
        test = self.evaluate()
        if not math.isfinite(test.loss):
            raise self._diverged(f"the test loss is {test.loss} after epoch {epoch}")
        self._stop_if_asked()
        self._check_weights()

        sums = self._whole_sums()
        self._done.finish_epoch(sums, test)
        self._sums = self._no_sums()
        return EpochRow(
            epoch=epoch,
            lr=self.learning_rate(epoch, self.steps),
            train_loss=self._own_loss(train),
            local_loss_sum=train.loss,
            test_loss=test.loss,
            seconds=sums.seconds,
            waiting=sums.waiting / sums.seconds,
            peak_bytes=peak_bytes(self.device),
            module_losses=train.module_losses,
            **rates(self._kind.unit, sums.images / sums.seconds),
            **measured(train, test),
        )

    def learning_rate(self, epoch: int, step: int = 1) -> float:
        """The rate of a step of an epoch, both counted from 1."""
        recipe = self._recipe
        if self.config.on_text:
            done = (epoch - 1) * self.steps
            return rate_of_step(done + step, recipe.epochs * self.steps, recipe.lr, recipe.warmup_steps or 0)
        return learning_rate(epoch, recipe.epochs, recipe.lr, recipe.warmup, str(self.config.schedule))

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up of a language model, whose rate changes with every step."""
        return warmup_of(self._recipe.warmup_steps or 0, self._recipe.epochs * self.steps)

    def _set_rate(self, epoch: int, done: int) -> None:
        """The rate of the step after so many of an epoch."""
        rate = self.learning_rate(epoch, min(done + 1, self.steps))
        for group in self._learner.optimizer.param_groups:
            group["lr"] = rate

    def _sample(self, epoch: int) -> str | None:
        if self._sampler is None:
            return None
        self.network.eval()
        with torch.no_grad():
            return self._sampler.sample(self._learner.predict, epoch, self.team, lambda: self._interrupt.requested)

    def _own_loss(self, reading: Reading) -> float:
        """The network's own loss on training images, which the last module's loss is up to the rule's weight."""
        weight = self._learner.classifier_weight
        return reading.module_losses[-1] / weight if weight else math.nan

    def _train(self, epoch: int) -> Reading:
        """The steps of the epoch that are still to do."""
        sums, stop = self._sums, self.team.stop("training")
        every = 1 if self.device.type == "cpu" else READ_EVERY
        self.team.wait()
        before, started, skipped = sums.seconds, time.perf_counter(), self._seen
        self.network.train()
        with self._bar(f"epoch {epoch}/{self._recipe.epochs}", self._units(self.data.train_count), skipped) as bar:
            for images, labels in self._feed(self._watched(self._batches.train(epoch, sums.steps))):
                self._set_rate(epoch, sums.steps)
                sums.add(self._learner.step(images, labels), self._units(len(labels)))
                if sums.steps % every == 0:
                    reading = self._read(epoch)
                    if not bar.disable:
                        per_unit = (time.perf_counter() - started) / (self._seen - skipped)
                        left = self._seconds_left(epoch, per_unit)
                        bar.set_postfix_str(self._bar_text(bar, left, reading), refresh=False)
                bar.update(self._seen - bar.n)
                if stop.after((epoch - 1) * self.steps + sums.steps, self._interrupt.requested):
                    break
        self._learner.finish()
        self._read(epoch)  # waits for the last step, which belongs to the time
        sums.seconds = before + time.perf_counter() - started
        self._stop_if_asked()
        return self._whole_sums().read()

    def _watched(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, until a signal that asks this process to stop has also ended those that read images."""
        try:
            yield from batches
        except WorkerError:
            if not self._interrupt.requested:
                raise

    @property
    def _seen(self) -> int:
        """Training images, or tokens, of the epoch so far, over all replicas."""
        return self._units(min(self._sums.steps * self._recipe.batch_size, self.data.train_count))

    def _units(self, samples: int) -> int:
        """Images, or tokens, in so many images or windows."""
        return samples * self._kind.per_sample(self.data.input_shape)

    def _bar_text(self, bar: Any, seconds_left: float, reading: Reading) -> str:
        if self._learner.own[-1] < self._learner.modules - 1:  # the network's loss is another stage's
            return f"run {bar.format_interval(seconds_left)}"
        return bar_text(bar, seconds_left, self._own_loss(reading), reading, self.device)

    def _seconds_left(self, epoch: int, per_unit: float) -> float:
        """Of the run. Until an epoch is over, the test images are taken to cost what training images do."""
        whole = self._epoch_seconds or per_unit * self._units(self.data.train_count + self.data.test_count)
        return per_unit * (self._units(self.data.train_count) - self._seen) + whole * (self._recipe.epochs - epoch)

    def _read(self, epoch: int) -> Reading:
        """Losses and waits so far; on CUDA the host waits for the device here and nowhere else."""
        reading = self._sums.read()
        waited = self._feed.waited()
        self._sums.waiting += waited
        self._images_seconds += waited
        if not math.isfinite(reading.loss):
            raise self._diverged(f"the loss is {reading.loss} in epoch {epoch}")
        return reading

    def _check_weights(self) -> None:
        """DivergedError if a weight, or a running statistic, is not finite: such a checkpoint is of no use."""
        state = ((k, v.to_local() if is_sharded(v) else v) for k, v in self.network.state_dict().items())
        found = next((k for k, v in state if not v.is_meta and not bool(torch.isfinite(v).all())), None)
        found = self.team.some(found)
        if found is not None:
            raise self._diverged(f"{found} is not finite after {self._where()}")

    def _diverged(self, what: str) -> DivergedError:
        warmup = "--warmup-steps" if self.config.on_text else "--warmup"
        ways = f"lower --lr or lengthen {warmup}"
        if self.config.amp != "none":
            ways = f"lower --lr, lengthen {warmup} or turn off --amp"
        if self._saved is None:
            return DivergedError(f"{what}: {ways} (nothing was saved)")
        return DivergedError(f"{what}: train again with another --output and {ways} ({self._saved})")

    def evaluate(self) -> Reading:
        """Mean cross-entropy of the network alone, and what its task measures, in eval mode, over the test images or
        the validation text.
        """
        sums = EpochSums(1, self.device, self._task, self._bytes_per_token)
        # Replicas that do not share parameters are not in step here.
        stop = self.team.stop(f"the test after epoch {self._done.epochs + 1}", replicas=self.config.shard)
        self.network.eval()
        with torch.no_grad(), self._bar("test", self._units(self.data.test_count)) as bar:
            for batch, (images, labels) in enumerate(self._watched(self._batches.test())):
                scored = self._learner.score(images, labels)
                if scored is not None:
                    result = StepResult.of_one_module(scored, self._task.counted(labels))
                    sums.add(result, self._kind.tested(self._task, labels))
                bar.update(self._units(len(labels)) * self.config.replicas)
                if stop.after(batch, self._interrupt.requested):
                    break
        return self.team.total(sums).read()

    def save(self) -> None:
        """Write the checkpoint: everything that ``resume`` needs to go on with the very next step."""
        state = {
            "settings": to_dict(self.config),
            "data": self._data_facts(),
            "progress": asdict(self._done),
            "epoch_sums": self._whole_sums().state_dict(),
            "batches": self._batches.state_dict(),
            "random": saving.random_states(self.team),
            "versions": versions(),
        }
        self.output.mkdir(parents=True, exist_ok=True)
        path = saving.save(self.output, state, self._learner, self.team)
        self._saved = f"{path} holds the run after {self._where()}"
        self._stands_on = saving.stamp(self.output)

    def _where(self) -> str:
        """How far the run has come."""
        if self._sums.steps == 0:
            return f"epoch {self._done.epochs}"
        return f"{self._sums.steps} of {self._batches.steps} steps of epoch {self._done.epochs + 1}"

    def draw(self) -> None:
        """Write curves.png, if an epoch is in the log."""
        if not self.team.first:
            return
        try:
            curves = read_curves(self.output)
        except CheckpointError:  # no epoch is done, or the log of those that are was moved away
            return
        done, (form, last, best) = self._done, self._done.measured()[-1]
        try:
            draw_run(
                self.output / CURVES,
                curves,
                self._title(),
                f"epoch {done.epochs} of {self._recipe.epochs}; test {form.name} {form.text(last)}, "
                f"best {form.text(best)} in epoch {done.best_epoch}",
            )
        except OSError as error:  # no reason to lose a run
            self._say(f"{self.output / CURVES} cannot be written: {error.strerror or error}")
        self._drawn = time.perf_counter()

    def _title(self) -> str:
        config, modules = self.config, self._learner.modules
        rule = "backpropagation" if config.rule == "bp" else f"{config.rule}, {modules} local modules"
        return f"{config.network}, {rule}"

    def resume(self) -> None:
        """Take up the run in ``config.output``; with other ``epochs`` the schedule is laid anew over them.

        CheckpointError if there is none, it is damaged, or it has other settings or data. The network may be partly
        loaded then.
        """
        find = saving.find(self.output) or self.output / CHECKPOINT
        path, stamp = self.team.everyone((find, saving.stamp(self.output)))[0]
        state = saving.read(path)
        self.config = resuming.settings(path, state, self.config, self._left_open)
        self._recipe = self.config.recipe_values
        resuming.refuse_other_data(path, state["data"], self._data_facts())
        saving.load(path, state, self._learner, self.team)
        sums = state["epoch_sums"]
        with stored.taken_from(path, "progress"):
            if sums["steps"] > self.steps or sums["sums"].shape != self._whole_sums().state_dict()["sums"].shape:
                raise ValueError(f"an epoch has {self.steps} steps of {self._learner.modules} local modules")
            self._done = Progress(**state["progress"])
            self._sums.load_part(sums, self.team.stage, self.team.replica, self._learner.own.start)
            self._batches.load_state_dict(state["batches"])
            saving.restore_random_states(state["random"], self.team)
        self._stands_on, self.resumed_after = stamp, self._where()
        self._epochs_before = state["settings"]["epochs"]
        self._saved = f"{path} holds the run after {self.resumed_after}"

    @property
    def extension(self) -> str | None:
        """What a resumed run with another number of epochs does, for the terminal."""
        epochs, before = self._recipe.epochs, self._epochs_before
        if before in (None, epochs):
            return None
        said = f"{epochs} epochs in place of {before}: the schedule is laid anew over all of them"
        coming = self._done.epochs + 1
        return said if coming > epochs else f"{said}; epoch {coming} has the rate {self.learning_rate(coming):.3g}"

    @property
    def memory_plan(self) -> MemoryPlan | None:
        """What ``recompute="peak"`` or ``memory_budget`` chose."""
        return self._learner.memory_plan

    def launch(self) -> str:
        """How steps will be launched, for the terminal."""
        return self._learner.launch()

    def predicted_peak(self) -> int:
        """Peak bytes of the tensors of a training step, predicted in seconds, without the images kept in memory."""
        return self._learner.predicted_peak(min(self._recipe.batch_size, self.data.train_count))

    def describe(self) -> dict[str, Any]:
        """Settings, data and versions, as config.json holds them."""
        facts = self._data_facts() | {"local_modules": self._learner.modules}
        threads = torch.get_num_threads()
        return {"settings": to_dict(self.config), "data": facts, "versions": versions(), "threads": threads}

    def _data_facts(self) -> dict[str, Any]:
        return self._kind.facts(self.data)

    @property
    def described_data(self) -> str:
        """What the data is, for the terminal."""
        return self._kind.described(self._data_facts())

    @property
    def held_out(self) -> str:
        """What the test is on, for the terminal."""
        return self._kind.held_out

    def _stop_if_asked(self) -> None:
        if self.team.any(self._interrupt.requested):
            self._check_weights()
            self.save()
            raise Interrupted(
                f"stopped in epoch {self._done.epochs + 1} after {self._sums.steps} of {self._batches.steps} "
                f"steps; saved {saving.find(self.output)}",
                self._interrupt.number,
            )

    def _no_sums(self) -> EpochSums:
        return EpochSums(len(self._learner.own), self.device, self._task, self._bytes_per_token)

    def _whole_sums(self) -> EpochSums:
        """Those of all modules and all images."""
        return self.team.whole(self._sums, self._learner.own.start, self._learner.modules)

    def _bar(self, description: str, total: int, initial: int = 0) -> Any:
        return unit_bar(total, self._kind.unit, description, self._bars, initial)


def _quoted(sample: str) -> str:
    """A sample for the terminal, indented, with marks in place of what would move its cursor."""
    lines = sample.replace("\r\n", "\n").expandtabs()
    shown = "".join(char if char.isprintable() or char == "\n" else "\N{REPLACEMENT CHARACTER}" for char in lines)
    return textwrap.indent(shown, "  | ", lambda line: True)

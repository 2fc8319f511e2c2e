"""What a training run says before its first epoch and after its last."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch

from ..cost import count_parameters
from ..training import Summary, TrainConfig, Trainer
from ..training.config.rule_options import RULE_OPTIONS, write_head
from ..training.config.values import write
from ..training.run.measures import ACCURACY, MIOU, Form
from ..training.run.records import LOG
from ..training.run.saving import find
from ..training.run.schedule_picture import shares_table
from ..training.run.text_samples import SAMPLES
from ..training.run.trainer import CURVES, SCHEDULE

_WIDTH = 80


def opening(trainer: Trainer) -> str:
    """The run in one block: network, rule, data, predicted memory, device, epochs, rates and where it goes."""
    config, facts = trainer.config, trainer.describe()["data"]
    trained, deployed = count_parameters(trainer.network), count_parameters(trainer.network, inference=True)
    where = "read from disk" if not facts.get("in_memory") else f"kept on {trainer.device}"
    device = str(trainer.device)
    if trainer.device.type == "cuda":
        device += f" ({torch.cuda.get_device_name(trainer.device)})"
    else:
        device += f" (threads: {torch.get_num_threads()})"
    epochs, before = config.epochs or 0, trainer.resumed_after
    steps = "1 step" if trainer.steps == 1 else f"{trainer.steps:,} steps"
    went = f"; resumes after {before}" if before else ""
    first, last = trainer.learning_rate(1), trainer.learning_rate(epochs, trainer.steps)
    return _aligned(
        [
            ("network", f"{config.network}: {trained:,} parameters trained, {deployed:,} deployed"),
            ("rule", rule_text(config, trainer.describe()["data"]["local_modules"])),
            ("data", f"{trainer.described_data}, {where}"),
            *_memory(trainer),
            *_processes(trainer),
            ("device", f"{device}; steps: {trainer.launch()}"),
            ("epochs", f"{epochs}, each of {steps}, batch size {config.batch_size}{_too_large(trainer)}{went}"),
            ("lr", f"{config.lr:g}; {config.schedule or 'stepwise'} cosine, {first:.3g} first, {last:.3g} last; "
             f"{_warmup(trainer)}"),
            ("output", str(trainer.output)),
        ]
    )  # fmt: skip


def _too_large(trainer: Trainer) -> str:
    """Of a batch that all images do not fill."""
    samples, size = trainer.data.train_count, trainer.config.batch_size or 0
    what = "windows" if trainer.config.on_text else "images"
    return f": more than the {samples} {what}; a smaller --batch-size makes more steps" if size > samples else ""


def _warmup(trainer: Trainer) -> str:
    if trainer.config.on_text:
        return f"warm-up {trainer.warmup_steps} steps"
    return f"warm-up {trainer.config.warmup} epochs"


def _memory(trainer: Trainer) -> list[tuple[str, str]]:
    if trainer.team.size > 1:
        return []
    return [("memory", f"{_size(trainer.predicted_peak())} at the peak of a step, predicted (tensors alone)")]


def _processes(trainer: Trainer) -> list[tuple[str, str]]:
    """How several processes share the network and the batches."""
    team, config = trainer.team, trainer.config
    if team.size == 1:
        return []
    grid = f"{_count(team.stages, 'stage')} of {_count(team.replicas, 'replica')}"
    parts = [f"{team.size}, {grid}, on {torch.distributed.get_backend()}"]
    if team.replicas > 1:
        what = "windows" if config.on_text else "images"
        parts.append(f"each replica takes {(config.batch_size or 0) // team.replicas} {what} of a batch")
    if team.stages > 1:
        held = [f"{own[0]} to {own[-1]}" if len(own) > 1 else f"{own[0]}" for own in trainer.stage_modules]
        parts.append(f"stages hold the local modules {', '.join(held)}")
    return [("processes", "; ".join(parts))]


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("s" if number > 1 else "")


def ending(trainer: Trainer, summary: Summary) -> str:
    """What the run came to, and where its files are."""
    read = "text" if trainer.config.on_text else "images"
    whose = "allocated on the GPU" if trainer.device.type == "cuda" else f"of the process, with torch and the {read}"
    block = _aligned(
        [
            *_metrics(summary, trainer.held_out),
            ("time", f"{summary.train_seconds:,.1f} s of training, {summary.waiting:.1%} of it waiting for {read}"),
            ("memory", f"{_size(summary.peak_bytes)} at the peak {whose}"),
            *files(trainer),
        ]
    )  # fmt: skip
    if trainer.shares is None:
        return block
    return f"{shares_table(trainer.team, trainer.stage_modules, trainer.shares)}\n\n{block}"


def _metrics(summary: Summary, held_out: str) -> list[tuple[str, str]]:
    *others, (own, last, best) = summary.measured()
    chosen = f"(epoch {summary.best_epoch}, chosen on {'them' if held_out.endswith('s') else 'it'})"
    return [
        (own.name, f"{own.text(last)} on {held_out}, best {own.text(best)} {chosen}"),
        *(_other(form, form.text(last), form.text(best), own) for form, last, best in others),
    ]


def _other(form: Form, last: str, best: str, own: Form) -> tuple[str, str]:
    """A measure beside the task's own."""
    if form == ACCURACY:
        return "pixels" if own == MIOU else "tokens", f"{last} of them right, {best} in that epoch"
    return form.name, f"{last}, {best} in that epoch"


def files(trainer: Trainer) -> list[tuple[str, str]]:
    """Name and path of each of the run's files that is there."""
    named = (
        *(("log", LOG), ("tensorboard", "tensorboard"), ("curves", CURVES), ("schedule", SCHEDULE)),
        ("samples", SAMPLES),
    )
    saved = find(trainer.output)
    return [
        *((name, str(trainer.output / file)) for name, file in named if (trainer.output / file).exists()),
        *([] if saved is None else [("checkpoint", str(saved))]),
    ]


def rule_text(config: TrainConfig, modules: int) -> str:
    """The rule with the options it was given, and into how many local modules it cuts the network."""
    if config.rule == "bp":
        return "bp: backpropagation of the whole network, no local modules"
    options = [
        f"{name.replace('_', '-')} {write_head(value) if name == 'head' else write(value)}"
        for name in RULE_OPTIONS[config.rule]
        if name != "modules" and (value := getattr(config, name)) is not None
    ]
    count = f"{config.rule}: {modules} local module" + ("s" if modules != 1 else "")
    return count + (f"; {', '.join(options)}" if options else "")


def _size(count: int) -> str:
    """Bytes for a person."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _aligned(lines: Sequence[tuple[str, str]]) -> str:
    width = 2 + max(len(name) for name, _ in lines)
    return "\n".join(
        textwrap.fill(
            text,
            _WIDTH,
            initial_indent=name.ljust(width),
            subsequent_indent=" " * width,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for name, text in lines
    )

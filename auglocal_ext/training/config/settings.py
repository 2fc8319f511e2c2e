"""The settings of a run, each declared once: its table in recipes, its values, and what the command line says of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from typing import Any, Literal, get_origin, get_type_hints

import torch

from ..data.datasets import DATASETS
from ..errors import SettingsError
from . import single_values
from .language_models import DEFAULTS, MLPS, NORMS, POSITIONS
from .recomputation import problem_of_recompute
from .rule_options import OPTIONS, RULE_OPTIONS
from .schedule import SCHEDULES
from .values import kinds_of, said

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

GRAPH: dict[str, Literal[True, False, "auto"]] = {"auto": "auto", "on": True, "off": False}

RECOMPUTE_HELP = (
    "what runs a second time to save memory: none (default); auxiliary, the auxiliary networks; N, the first N layers "
    "of every local module; all; these for each module, such as 3,3,all; peak: what gives the lowest peak"
)

#: Arguments of :class:`auglocal_ext.LocalStep` that a run does not have: why not, and what to do.
PYTHON_ALONE = {
    "delay": "is no setting of a run, whose epochs, logs and checkpoints end with all stages on the same batch: leave "
    "it out, or train in a loop of your own by LocalStep(..., mesh=mesh, delay=D), see docs/many-devices.md",
    "accumulate": "is no setting of a run: leave it out and take smaller batches, or train in a loop of your own by "
    "LocalStep(..., accumulate=N)",
}


@dataclass(frozen=True)
class Setting:
    """A setting of a run.

    Attributes:
        name: in recipes; on the command line with dashes.
        kind: type of its values, None aside.
        table: in which a recipe has it.
        help: a line for ``--help``; None where the command line has no such option, or another place adds it.
        metavar: what stands for a value in help.
        choices: all values it may have; empty where they are not listed.
        least: smallest value.
        most: largest value, beside ``least``.
        positive: whether values are above 0.
        wrong: says what else is wrong with a value; None if nothing is.
        option: whether the command line has it.
    """

    name: str
    kind: Any
    table: str
    help: str | None = None
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    least: int | None = None
    most: int = 2**31 - 1
    positive: bool = False
    wrong: Callable[[Any], str | None] | None = None
    option: bool = True

    @property
    def flag(self) -> str:
        """What messages call it: its option on the command line, or its name where there is none."""
        return "--" + self.name.replace("_", "-") if self.option else self.name

    def check(self, value: Any) -> None:
        """SettingsError for what is no value of it."""
        if (problem := self.problem(value)) is not None:
            raise SettingsError(f"{self.flag} {problem}")

    def problem(self, value: Any) -> str | None:
        """Why this is no value of it, without its name; None if it is one."""
        if value is None:
            return None
        parts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(part, float) and not math.isfinite(part) for part in parts):
            return f"must be finite, got {value}"
        if self.choices and value not in self.choices:
            return f"is one of {', '.join(self.choices)}, not {value!r}"
        if self.least is not None and value < self.least:
            return f"must be at least {self.least}, got {said(value)}"
        if self.least is not None and value > self.most:
            return f"must be at most {self.most}, got {said(value)}"
        if self.positive and not value > 0:
            return f"must be positive, got {value}"
        return None if self.wrong is None else self.wrong(value)


def _setting(
    default: Any,
    table: str,
    help: str | None = None,
    metavar: str | None = None,
    *,
    choices: Sequence[str] = (),
    **others: Any,
) -> Any:
    known = {"table": table, "help": help, "metavar": metavar, "choices": tuple(choices), **others}
    return field(default=default, metadata=known)


#: A field for each option of the rules, None where it was not given.
_RuleSettings: Any = make_dataclass(
    "_RuleSettings",
    [
        (name, option.kind | None, _setting(None, "rule", wrong=single_values.modules if name == "modules" else None))
        for name, option in OPTIONS.items()
    ],
    frozen=True,
    kw_only=True,
)


@dataclass(frozen=True)
class Settings(_RuleSettings):
    """Names, types and defaults of the settings; :class:`auglocal_ext.training.TrainConfig` says what they are."""

    data: str = field(
        metadata={"table": "data", "help": "the images, or a text (required unless --resume)", "metavar": "DIR|FILE"}
    )
    output: str
    dataset: str = _setting("auto", "data", "what lies in --data; auto: by the files there (default)", choices=DATASETS)
    recipe: str = "auto"
    recipe_file: str | None = None
    network: str = _setting("resnet32", "network", wrong=single_values.network)
    network_weights: str | None = _setting(
        None,
        "network",
        "begin with published weights: a state dict in the format of torch.save or safetensors",
        "FILE",
    )
    width: int | None = _setting(None, "network", least=1)
    layers: int | None = _setting(None, "network", f"of gpt: blocks (default {DEFAULTS['layers']})", "N", least=1)
    heads: int | None = _setting(None, "network", f"of gpt: in attention (default {DEFAULTS['heads']})", "N", least=1)
    context_length: int | None = _setting(
        None,
        "network",
        f"of gpt: tokens in a window (default {DEFAULTS['context_length']}); --context N is the same",
        "N",
        least=2,
    )
    norm: str | None = _setting(None, "network", f"of gpt (default {DEFAULTS['norm']})", choices=NORMS)
    positions: str | None = _setting(None, "network", f"of gpt (default {DEFAULTS['positions']})", choices=POSITIONS)
    mlp: str | None = _setting(None, "network", f"of gpt (default {DEFAULTS['mlp']})", choices=MLPS)
    tied: bool | None = _setting(None, "network", "of gpt: readout and token embedding are one parameter")
    rule: str = _setting("auglocal", "rule", choices=tuple(RULE_OPTIONS))
    fused: bool = _setting(True, "step")
    recompute: str = _setting(
        "none",
        "step",
        RECOMPUTE_HELP,
        "WHAT",
        wrong=problem_of_recompute,
    )
    memory_budget: str | None = _setting(
        None,
        "step",
        "such as 0.4GiB: the cheapest recomputation whose predicted step fits; the plan is printed",
        "SIZE",
        wrong=single_values.memory_budget,
    )
    graph: str = _setting(
        "auto",
        "step",
        "run a local rule's step as one CUDA graph; auto (default): where it can be captured, and say why not",
        choices=tuple(GRAPH),
    )
    overlap: bool | None = _setting(
        None,
        "step",
        "run a local module's backward beside the next one's forward, on two CUDA streams, with the activations of two "
        "modules alive at a time",
    )
    epochs: int | None = _setting(
        None, "optimisation", "of the whole run; with --resume they may be others than before", "N", least=1
    )
    batch_size: int | None = _setting(None, "optimisation", "of all replicas together", "N", least=2)
    lr: float | None = _setting(None, "optimisation", "peak learning rate", "X", positive=True)
    momentum: float | None = _setting(None, "optimisation", option=False, wrong=single_values.momentum)
    weight_decay: float | None = _setting(
        None, "optimisation", "of every parameter; of gpt without norms, biases and embeddings", "X", least=0
    )
    clip_norm: float | None = _setting(
        None, "optimisation", "of gpt: largest norm of a local module's gradients (default 1)", "X", positive=True
    )
    warmup: int | None = _setting(None, "optimisation", "epochs of linear warm-up", "N", least=0)
    warmup_steps: int | None = _setting(
        None, "optimisation", "of gpt: steps of linear warm-up (default 100), at most a tenth of the run", "N", least=0
    )
    schedule: str | None = _setting(
        None,
        "optimisation",
        "of the rate: published (the papers' cosine, default from 100 epochs on) or short (no epoch at rate 0, default "
        "below)",
        choices=SCHEDULES,
    )
    padding: int | None = _setting(None, "augmentation", option=False, least=0)
    padding_mode: str | None = _setting(None, "augmentation", option=False, choices=("reflect", "zero"))
    flip: bool | None = _setting(None, "augmentation", option=False)
    mean: tuple[float, ...] | None = _setting(None, "augmentation", option=False, wrong=single_values.mean)
    std: tuple[float, ...] | None = _setting(None, "augmentation", option=False, wrong=single_values.std)
    mixup: float | None = _setting(
        None, "augmentation", "mix images in pairs, shares from Beta(A, A); labels become probabilities", "A", least=0
    )
    cutmix: float | None = _setting(
        None, "augmentation", "the same by rectangles; with both, either is drawn for each batch", "A", least=0
    )
    seed: int = _setting(1234, "optimisation", "0 to 2^64 - 1 (default 1234)", "N", least=0, most=2**64 - 1)
    amp: str = _setting("none", "step", "mixed precision (default none)", choices=tuple(AMP))
    channels_last: bool = _setting(False, "step", "store images and activations channels last")
    device: str = _setting("auto", "step", "auto (default), cpu, cuda, cuda:1, ...", "NAME", wrong=single_values.device)
    image_size: int | None = _setting(
        None, "data", "resize the images of a folder to N x N, read from disk each epoch", "N", least=8
    )
    train_images: int | None = _setting(
        None, "data", "train on N images drawn once, the same ones for equal --seed", "N", least=2
    )
    tokenizer: str | None = _setting(
        None, "data", "of a text: a tokenizer.json of Hugging Face (default: tokens are bytes)", "FILE"
    )
    sample: int | None = _setting(
        None, "data", "of a text: characters that are sampled after each epoch (default 200)", "N", least=0
    )
    workers: int | None = _setting(
        None, "data", "processes that read images (default: one per core, at most 16)", "N", least=0
    )
    stages: int = _setting(
        1, "processes", "runs of local modules, each trained by processes of its own (default 1)", "S", least=1
    )
    replicas: int = _setting(
        1,
        "processes",
        "processes that share each batch of --batch-size images (default: all processes divided by --stages)",
        "R",
        least=1,
    )
    stage_cuts: tuple[int, ...] | None = _setting(
        None,
        "processes",
        "first local module of each stage but the first (default: stages of about equal FLOPs)",
        "I,J,..",
        wrong=single_values.stage_cuts,
    )
    sync_batch_norm: bool = _setting(
        False, "processes", "BatchNorm takes its statistics over all replicas, as one process does over the batch"
    )
    shard: bool = _setting(
        False,
        "processes",
        "replicas share parameters, gradients and optimizer state instead of each holding all of them",
    )
    gather_features: bool = _setting(
        False, "processes", "losses that compare images (predsim, infopro's contrast) see those of all replicas"
    )


def _declared() -> Iterator[Setting]:
    hints = get_type_hints(Settings)
    for each in sorted(fields(Settings), key=lambda each: each.name != "rule"):  # before its options
        if "table" in each.metadata:
            yield Setting(each.name, _kind(each.name, hints[each.name]), **each.metadata)


def _kind(name: str, hint: Any) -> Any:
    """``bool`` of ``bool | None``, and ``str`` of literal text."""
    if name in OPTIONS:
        return OPTIONS[name].kind
    kind = kinds_of(hint)[0]
    return str if get_origin(kind) is Literal else kind


#: Every setting that a recipe may have, by name.
SETTINGS: dict[str, Setting] = {each.name: each for each in _declared()}

#: The tables of a recipe in their order: the settings in each, with the types of their values.
TABLES: dict[str, dict[str, Any]] = {
    table: {each.name: each.kind for each in SETTINGS.values() if each.table == table}
    for table in ("data", "network", "rule", "step", "processes", "optimisation", "augmentation")
}

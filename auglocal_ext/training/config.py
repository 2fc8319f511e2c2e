"""The settings of a run: checked when made, completed from the data set's recipe and the rule's defaults."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from ..local_modules import RECOMPUTE, Recompute
from ..models import NAMES
from ..rules.auglocal import AugLocal
from ..rules.base import Rule
from ..rules.contsup import ContSup
from .errors import SettingsError
from .recipes import RECIPES, Recipe
from .schedule import default_warmup

RULE_OPTIONS: dict[str, tuple[str, ...]] = {
    "auglocal": ("depth", "pyramid", "joint_tail", "head", "modules"),
    "contsup": ("context", "head", "modules"),
    "bp": (),
}
AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

GRAPH: dict[str, Literal[True, False, "auto"]] = {"auto": "auto", "on": True, "off": False}

RECOMPUTE_CHOICES = (*RECOMPUTE, "peak")

# How a local rule's step runs, with the value that leaves it open; none of it is backpropagation's.
_STEP_OPTIONS = {"recompute": "none", "memory_budget": None, "graph": "auto", "overlap": None}

# A run goes on wherever its folders now lie, however many processes read its images and its steps are launched.
_FREE_TO_CHANGE = ("data", "output", "workers", "graph", "overlap")


@dataclass(frozen=True)
class TrainConfig:
    """What is trained on what, and how; ``None`` stands for the recipe's or the rule's own value.

    Rules: ``"auglocal"`` (depth, pyramid, joint_tail, head), ``"contsup"`` (context, head), both with
    ``modules`` (None, a count, or explicit cut points), ``fused`` and ``recompute`` as
    :class:`auglocal_ext.LocalSequential` has them, ``recompute="peak"``, ``memory_budget`` (such as "0.4GiB"),
    ``graph`` ("auto", "on", "off") and ``overlap`` (None, True, False) as :class:`auglocal_ext.step.LocalStep` has
    them, and ``"bp"``, backpropagation of the same network, eager.
    ``amp`` is ``"none"``, ``"bf16"`` or ``"fp16"`` (with a GradScaler); ``device`` is ``"auto"`` or torch's
    name.

    Raises SettingsError for a value that cannot be, and for an option of another rule.
    """

    data: str
    output: str
    dataset: str = "auto"
    recipe: str = "auto"
    network: str = "resnet32"
    width: int | None = None
    rule: str = "auglocal"
    depth: int | None = None
    pyramid: float | None = None
    joint_tail: bool | None = None
    context: str | None = None
    head: str | None = None
    modules: int | tuple[int, ...] | None = None
    fused: bool = True
    recompute: Recompute | Literal["peak"] = "none"
    memory_budget: str | None = None
    graph: str = "auto"
    overlap: bool | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    weight_decay: float | None = None
    warmup: int | None = None
    seed: int = 1234
    amp: str = "none"
    channels_last: bool = False
    device: str = "auto"
    image_size: int | None = None
    train_images: int | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        _one_of("network", self.network, NAMES)
        _one_of("rule", self.rule, RULE_OPTIONS)
        _one_of("recipe", self.recipe, ("auto", *RECIPES))
        _one_of("amp", self.amp, AMP)
        _one_of("recompute", self.recompute, RECOMPUTE_CHOICES)
        _one_of("graph", self.graph, GRAPH)
        for name, left_open in _STEP_OPTIONS.items():
            if self.rule == "bp" and getattr(self, name) != left_open:
                raise SettingsError(f"{_flag(name)} belongs to the local rules, not to bp")
        if self.memory_budget is not None and self.recompute != "none":
            raise SettingsError("--memory-budget chooses itself what is recomputed: leave out --recompute")
        for name, least in (
            ("width", 1),
            ("epochs", 1),
            ("batch_size", 2),
            ("warmup", 0),
            ("seed", 0),
            ("image_size", 8),
            ("train_images", 2),
            ("workers", 0),
            ("weight_decay", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise SettingsError(f"{_flag(name)} must be at least {least}, got {value}")
        if self.lr is not None and not self.lr > 0:
            raise SettingsError(f"--lr must be positive, got {self.lr}")
        if self.epochs is not None and self.warmup is not None and self.warmup > self.epochs:
            raise SettingsError(f"--warmup {self.warmup} is longer than the run of {self.epochs} epochs")
        for name in sorted({option for options in RULE_OPTIONS.values() for option in options}):
            if getattr(self, name) is not None and name not in RULE_OPTIONS[self.rule]:
                owners = " and ".join(rule for rule, options in RULE_OPTIONS.items() if name in options)
                raise SettingsError(f"{_flag(name)} belongs to the rule {owners}, not to {self.rule}")
        make_rule(self)

    @property
    def recipe_values(self) -> Recipe:
        """The recipe of a resolved configuration, with what it overrides."""
        names = ("epochs", "batch_size", "lr", "weight_decay", "warmup")
        overrides: dict[str, Any] = {name: getattr(self, name) for name in names}
        given = {name: value for name, value in overrides.items() if value is not None}
        return replace(RECIPES[self.recipe], **given)


def resolve(config: TrainConfig, dataset: str, streamed: bool) -> TrainConfig:
    """``config`` with every None that has a default replaced by it.

    The recipe is the data set's own; for image folders CIFAR-10's if kept in memory, ImageNet's if not.
    The warm-up is the recipe's, at most a quarter of the run. Raises SettingsError for a step that needs CUDA on a
    device that is not.
    """
    folder_recipe = "imagenet" if streamed else "cifar10"
    name = config.recipe if config.recipe != "auto" else folder_recipe if dataset == "folder" else dataset
    recipe = RECIPES[name]
    device = pick_device(config.device)
    config = replace(config, device=str(device))
    for flag, wanted in (("--graph on", config.graph == "on"), ("--overlap", config.overlap)):
        if wanted and device.type != "cuda":
            raise SettingsError(f"{flag} needs a CUDA device, this run is on {device.type}")
    epochs = recipe.epochs if config.epochs is None else config.epochs
    defaults: dict[str, Any] = {
        "batch_size": recipe.batch_size,
        "lr": recipe.lr,
        "weight_decay": recipe.weight_decay,
        "warmup": default_warmup(recipe.warmup, epochs),
    }
    rule = make_rule(config)
    defaults |= {option: getattr(rule, option) for option in RULE_OPTIONS[config.rule] if option != "modules"}
    missing = {field: value for field, value in defaults.items() if getattr(config, field) is None}
    data = str(Path(config.data).expanduser().resolve())  # a run may be resumed from another folder
    return replace(config, data=data, dataset=dataset, recipe=name, epochs=epochs, **missing)


def make_rule(config: TrainConfig) -> Rule | None:
    """The local learning rule, or None for backpropagation; SettingsError for values the rule refuses."""
    if config.rule == "bp":
        return None
    options = {
        option: getattr(config, option)
        for option in RULE_OPTIONS[config.rule]
        if option != "modules" and getattr(config, option) is not None
    }
    try:
        return AugLocal(**options) if config.rule == "auglocal" else ContSup(**options)
    except (TypeError, ValueError) as error:
        raise SettingsError(str(error)) from error


def pick_device(name: str) -> torch.device:
    """The device of ``--device``; SettingsError if there is no such one here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise SettingsError(f"--device is auto, cpu, cuda or cuda:<index>, not {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise SettingsError(f"--device is auto, cpu, cuda or cuda:<index>, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values, as they are stored in config.json and in checkpoints."""
    values = asdict(config)
    values["modules"] = list(config.modules) if isinstance(config.modules, tuple) else config.modules
    return values


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The inverse of ``to_dict``; settings it does not know are an error."""
    known = {field.name for field in fields(TrainConfig)}
    if unknown := sorted(set(values) - known):
        raise SettingsError(f"unknown settings {', '.join(unknown)}: written by another version?")
    modules = values.get("modules")
    return TrainConfig(**{**values, "modules": tuple(modules) if isinstance(modules, list) else modules})


def differences(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """One line per setting that a resumed run may not change and ``given`` changes."""
    return [
        f"{_flag(name)}: {stored.get(name)!r} in the checkpoint, now {value!r}"
        for name, value in given.items()
        if name not in _FREE_TO_CHANGE and stored.get(name) != (list(value) if isinstance(value, tuple) else value)
    ]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _one_of(name: str, value: str, known: Any) -> None:
    if value not in known:
        raise SettingsError(f"{_flag(name)} is one of {', '.join(known)}, not {value!r}")

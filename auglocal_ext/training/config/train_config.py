"""The settings of a run: checked when made, completed from recipes and the rule's defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

import torch

from ...rules import Rule
from ..data.augment import Augmentation
from ..data.text import NAME as TEXT
from ..errors import SettingsError
from ..paths import user_path
from . import rule_options
from .infopro_weights import infopro_weights
from .language_models import DEFAULTS, check_kind, is_language_model
from .recipes import DATA_RECIPES, Recipe, find, names, read, write_recipe
from .rule_options import OPTIONS, RULE_OPTIONS
from .schedule import default_schedule, default_warmup
from .settings import SETTINGS, TABLES, Settings

# How a local rule's step runs, with the value that leaves it open; none of it is backpropagation's.
_STEP_OPTIONS = {"recompute": "none", "memory_budget": None, "graph": "auto", "overlap": None}

# A run goes on wherever its folders now lie, however many processes read its images, how its steps are launched, how
# many processes take them, and for how many epochs.
_FREE_TO_CHANGE = (
    *("data", "output", "workers", "graph", "overlap", "epochs", "tokenizer", "sample"),
    *("stages", "replicas", "stage_cuts", "sync_batch_norm", "shard", "gather_features"),
)

# The settings of a recipe that is a data set's own.
_TRAINING = tuple(
    name
    for name in (*TABLES["optimisation"], *TABLES["augmentation"])
    if name not in ("schedule", "seed", "mixup", "cutmix")
)


@dataclass(frozen=True)
class TrainConfig(Settings):
    """What is trained on what, and how; ``None`` stands for the recipe's or the rule's own value.

    Rules and their options: ``rule_options.RULE_OPTIONS``, as the rules of :mod:`auglocal_ext.rules` have them;
    ``modules`` is None, a count, or explicit cut points; ``head`` names a classifier or a rule, or is a table of a rule
    and its options: ``{"rule": "auglocal", "depth": 3}``, or as text ``"auglocal:depth=3"``. ``fused`` and
    ``recompute`` are as :class:`auglocal_ext.LocalSequential` has them, ``recompute="peak"`` and ``memory_budget``
    (such as "0.4GiB") as :func:`auglocal_ext.planning.plan_memory`, ``graph`` ("auto", "on", "off") and ``overlap``
    (None, True, False) as :class:`auglocal_ext.LocalStep`. The rule ``"bp"`` is backpropagation of the same network,
    eager.
    ``network`` is a name as :func:`auglocal_ext.models.network_by_name` takes it, and ``network_weights`` a file of the
    weights to begin with; or ``"gpt"``, a language model (:func:`auglocal_ext.models.gpt`) of so many ``layers``,
    ``width``, ``heads``, ``context_length``, ``norm``, ``positions``, ``mlp`` and ``tied``, on a text in tokens of
    ``tokenizer`` (None: bytes), of which ``sample`` characters are written after each epoch. ``schedule`` is
    ``"published"`` or ``"short"`` (:func:`auglocal_ext.training.config.schedule.learning_rate`), None for the one
    that goes with ``epochs``: short below 100; a language model has one of its own. ``mixup`` and ``cutmix`` are alpha
    of Beta(alpha, alpha) (:class:`auglocal_ext.training.data.mixing.MixedBatches`), None or 0 for none. ``amp`` is
    ``"none"``, ``"bf16"`` or ``"fp16"`` (with a GradScaler); ``device`` is ``"auto"`` or torch's name. ``recipe``
    is the data set's training ("auto": the one at hand); ``from_recipe`` takes any recipe, network and rule
    included, and notes it in ``recipe_file``.
    ``stages`` times ``replicas`` is the number of processes, which torchrun starts; ``batch_size`` is that of all
    replicas together. ``stage_cuts``, ``sync_batch_norm``, ``shard`` and ``gather_features`` are as LocalStep has
    them; all but the first change nothing where there is one replica.

    Raises SettingsError for a value that cannot be, and for an option of another rule.
    """

    def __post_init__(self) -> None:
        if self.head is not None:
            object.__setattr__(self, "head", rule_options.read_head(self.head))
        if self.recipe not in ("auto", *DATA_RECIPES):
            raise SettingsError(
                f"recipe is one of auto, {', '.join(DATA_RECIPES)}, not {self.recipe!r}; "
                "TrainConfig.from_recipe(recipe, ...) takes any other, and files"
            )
        for setting in SETTINGS.values():
            setting.check(getattr(self, setting.name))
        check_kind(vars(self))
        for name, left_open in _STEP_OPTIONS.items():
            if self.rule == "bp" and getattr(self, name) != left_open:
                raise SettingsError(f"{_flag(name)} belongs to the local rules, not to bp")
        if self.stage_cuts is not None and self.stages == 1:
            raise SettingsError("--stage-cuts is for several stages: add --stages N, or leave it out")
        if self.rule == "bp" and self.stages > 1:
            raise SettingsError("--stages is for local modules, which bp has none of: take --replicas, or a local rule")
        for name in ("sync_batch_norm", "shard", "gather_features"):
            if self.rule == "bp" and getattr(self, name):
                raise SettingsError(f"{_flag(name)} belongs to the local rules, not to bp")
        if self.amp == "fp16" and self.stages > 1:
            raise SettingsError("--amp fp16 is not for stages, each of which would find a scale of its own: take bf16")
        if self.memory_budget is not None and self.recompute != "none":
            raise SettingsError("--memory-budget chooses itself what is recomputed: leave out --recompute")
        if self.epochs is not None and self.warmup is not None and self.warmup > self.epochs:
            raise SettingsError(f"--warmup {self.warmup} is longer than the run of {self.epochs} epochs")
        for name in OPTIONS:
            if getattr(self, name) is not None and name not in RULE_OPTIONS[self.rule]:
                owners = " and ".join(rule for rule, options in RULE_OPTIONS.items() if name in options)
                raise SettingsError(f"{_flag(name)} belongs to the rule {owners}, not to {self.rule}")
        make_rule(self)

    @classmethod
    def from_recipe(cls, recipe: str, **settings: Any) -> TrainConfig:
        """The settings of a recipe, by its name or its file's path, with ``settings`` in the place of its own.

        Fewer or more ``epochs`` than the recipe's shorten its warm-up to a quarter of the run at most and choose
        the schedule anew; another ``rule`` leaves out what the recipe says of its own. Raises RecipeError, a
        SettingsError, with file and line, for a wrong recipe.
        """
        return cls(**with_recipe(recipe, settings))

    @property
    def mixes(self) -> bool:
        """Whether images are mixed in pairs."""
        return bool(self.mixup or self.cutmix)

    @property
    def on_text(self) -> bool:
        """Whether the network is a language model, not one for images."""
        return is_language_model(self.network)

    @property
    def augmentation(self) -> Augmentation:
        """How the images of a resolved configuration are augmented; SettingsError for one on text."""
        found = self.recipe_values.augmentation
        if found is None:
            raise SettingsError(f"--network {self.network} learns text, of which nothing is augmented")
        return found

    @property
    def recipe_values(self) -> Recipe:
        """The training of a resolved configuration."""
        return Recipe.of({name: getattr(self, name) for name in _TRAINING})


def with_recipe(recipe: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """``given`` and what a recipe says of the rest, as TrainConfig takes them; see ``TrainConfig.from_recipe``."""
    given = {name: value for name, value in given.items() if value is not None}
    if recipe == "auto" or recipe in DATA_RECIPES:
        return {**given, "recipe": recipe}  # resolve() reads it, when the data set is known
    file = read(recipe)
    own = dict(file.settings)
    if "rule" in own and given.get("rule", own["rule"]) != own["rule"]:
        own = {name: value for name, value in own.items() if name not in TABLES["rule"]}
    epochs = given.get("epochs")
    if "warmup" in own and epochs is not None and epochs != own.get("epochs"):
        own["warmup"] = default_warmup(own["warmup"], epochs)
    if epochs is not None and epochs != own.get("epochs", epochs):
        own.pop("schedule", None)  # it was chosen for the recipe's number of epochs
    label = recipe if recipe in names() else str(find(recipe))
    return own | given | {"recipe": file.base, "recipe_file": label}


def resolve(config: TrainConfig, dataset: str, streamed: bool) -> TrainConfig:
    """``config`` with every None that has a default replaced by it.

    The recipe is the data set's own; for image folders CIFAR-10's if kept in memory, ImageNet's if not.
    The warm-up is the recipe's, at most a quarter of the run; the schedule is the published one from 100 epochs on.
    Raises SettingsError for a step that needs CUDA on a device that is not.
    """
    folder_recipe = "imagenet" if streamed else "cifar10"
    name = config.recipe if config.recipe != "auto" else folder_recipe if dataset == "folder" else dataset
    device = pick_device(config.device)
    for flag, wanted in (("--graph on", config.graph == "on"), ("--overlap", config.overlap)):
        if wanted and device.type != "cuda":
            raise SettingsError(f"{flag} needs a CUDA device, this run is on {device.type}")
    recipe = read(name).settings
    if (name == TEXT) != config.on_text:
        raise SettingsError(f"the recipe {name} is for {'text' if name == TEXT else 'images'}: choose another --recipe")
    epochs = recipe["epochs"] if config.epochs is None else config.epochs
    recipe = recipe | {"epochs": epochs}
    data = str(user_path(config.data).resolve())  # a run may be resumed from another folder
    known: dict[str, Any] = {"data": data, "dataset": dataset, "recipe": name, "device": str(device)}
    for file in ("network_weights", "tokenizer"):
        if getattr(config, file) is not None:
            known[file] = str(user_path(getattr(config, file)).resolve())
    if config.on_text:
        recipe = DEFAULTS | recipe
    else:
        recipe = {"schedule": default_schedule(epochs)} | recipe
        recipe["warmup"] = default_warmup(recipe["warmup"], epochs)
    config = replace(config, **known, **_missing(config, recipe))
    return replace(config, **_rule_defaults(config))


def _missing(config: TrainConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if getattr(config, name) is None}


def _rule_defaults(config: TrainConfig) -> dict[str, Any]:
    """The options of the rule that were left out, and InfoPro's weights, which depend on the data set."""
    rule = make_rule(config)
    if rule is None:
        return {}
    filled = rule_options.fill_weights(
        config.rule,
        _given_options(config),
        lambda: infopro_weights(config.dataset, config.network, rule, config.modules),
    )
    defaults = rule_options.values_of(config.rule, rule)
    return _missing(config, defaults) | filled


def _given_options(config: TrainConfig) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in RULE_OPTIONS[config.rule] if name != "modules"}
    return {name: value for name, value in values.items() if value is not None}


def make_rule(config: TrainConfig) -> Rule | None:
    """The local learning rule, or None for backpropagation; SettingsError for values the rule refuses."""
    if config.rule == "bp":
        return None
    return rule_options.make(config.rule, _given_options(config), config.mean, config.std)


def pick_device(name: str) -> torch.device:
    """The device of ``--device``; SettingsError if there is no such one here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    SETTINGS["device"].check(name)
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(f"--device {name}: torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def to_dict(config: TrainConfig) -> dict[str, Any]:
    """Plain values, as they are stored in config.json and in checkpoints."""
    return {name: _listed(value) for name, value in asdict(config).items()}


def _listed(value: Any) -> Any:
    """With lists in place of tuples, as JSON has them."""
    if isinstance(value, dict):
        return {name: _listed(each) for name, each in value.items()}
    return list(value) if isinstance(value, tuple) else value


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """The inverse of ``to_dict``; settings it does not know are an error."""
    known = {field.name for field in fields(TrainConfig)}
    if unknown := sorted(set(values) - known):
        raise SettingsError(f"unknown settings {', '.join(unknown)}: written by another version?")
    tuples: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return TrainConfig(**tuples)


def to_recipe(config: TrainConfig) -> str:
    """The text of a recipe file that says all of a resolved configuration but the run folder.

    One stage and one replica are left out: torchrun's processes then say how many there are.
    """
    values = asdict(config)
    open_ones = {name: None for name in ("stages", "replicas") if values[name] == 1}
    return write_recipe({**values, **open_ones}, config.recipe)


def differences(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """One line per setting that a resumed run may not change and ``given`` changes."""
    before = _defaults(stored.get("rule")) | stored  # a run of a version that lacked a setting had its default
    return [
        f"{_flag(name)}: {_shown(name, before[name])} in the checkpoint, now {_shown(name, value)}"
        for name, value in given.items()
        if name not in _FREE_TO_CHANGE and name in before and not _same(name, before[name], value)
    ]


def _shown(name: str, value: Any) -> str:
    return repr(rule_options.write_head(rule_options.read_head(value)) if name == "head" and value else value)


def _defaults(rule: str | None) -> dict[str, Any]:
    """Settings that are not given, the options of the rule ``rule`` with its own defaults.

    Without those of a data set's recipe: what a version that lacked one did in its place is not known.
    """
    own = {name: option.rules[rule].default for name, option in OPTIONS.items() if rule in option.rules}
    left = [each for each in fields(TrainConfig) if each.name not in (*_TRAINING, "schedule")]
    return {each.name: each.default for each in left if each.default is not MISSING} | own


def _same(name: str, stored: Any, given: Any) -> bool:
    if name == "head" and stored is not None and given is not None:
        return rule_options.includes(rule_options.read_head(stored), rule_options.read_head(given))
    if name == "device":  # which of them changes nothing
        return str(stored).partition(":")[0] == str(given).partition(":")[0]
    if name == "network_weights" and given is not None:
        given = str(user_path(given).resolve())
    return stored == (list(given) if isinstance(given, tuple) else given)


def _flag(name: str) -> str:
    return "--recipe" if name == "recipe_file" else "--" + name.replace("_", "-")

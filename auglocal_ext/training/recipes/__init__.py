"""Recipes: settings of experiments in INI files, one per experiment, which a user may copy and change."""

from __future__ import annotations

import configparser
import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..augment import Augmentation
from ..errors import SettingsError
from ..rule_options import OPTIONS
from ..values import reader, user_path, write

_FOLDER = Path(__file__).parent

#: The recipes that hold a data set's training alone and no network or rule: what ``auto`` chooses from.
DATA_RECIPES = ("cifar10", "svhn", "stl10", "imagenet", "masks")

#: The sections of a recipe file and the settings in each, with their types; [recipe] says what it is based on.
SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"data": str, "dataset": str, "image_size": int, "train_images": int, "workers": int},
    "network": {"network": str, "network_weights": str, "width": int},
    "rule": {"rule": str} | {name: option.kind for name, option in OPTIONS.items()},
    "step": {
        "fused": bool,
        "recompute": str,
        "memory_budget": str,
        "graph": str,
        "overlap": bool,
        "amp": str,
        "channels_last": bool,
        "device": str,
    },
    "processes": {
        "stages": int,
        "replicas": int,
        "stage_cuts": tuple[int, ...],
        "sync_batch_norm": bool,
        "shard": bool,
        "gather_features": bool,
    },
    "optimisation": {
        "epochs": int,
        "batch_size": int,
        "lr": float,
        "momentum": float,
        "weight_decay": float,
        "warmup": int,
        "schedule": str,
        "seed": int,
    },
    "augmentation": {
        "padding": int,
        "padding_mode": str,
        "flip": bool,
        "mean": tuple[float, ...],
        "std": tuple[float, ...],
        "mixup": float,
        "cutmix": float,
    },
}


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum, a cosine schedule stepped per epoch, and the images' augmentation.

    Weight decay acts on every parameter, BatchNorm's and biases included, as in AugLocal's released code.
    """

    epochs: int
    batch_size: int
    lr: float
    warmup: int
    augmentation: Augmentation
    weight_decay: float
    momentum: float

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Recipe:
        """From settings, where none of them may be missing or None; ValueError for an augmentation that cannot be."""
        names = ("epochs", "batch_size", "lr", "warmup", "weight_decay", "momentum")
        augmentation = Augmentation(**{field.name: settings[field.name] for field in fields(Augmentation)})
        return cls(augmentation=augmentation, **{name: settings[name] for name in names})


@dataclass(frozen=True)
class RecipeFile:
    """What a recipe file says: the data set's recipe it is based on (or "auto"), and settings of its own."""

    base: str
    settings: dict[str, Any]


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.ini"))


def title(name: str) -> str:
    """The first line of a recipe that comes with the package, which says what it is."""
    return (_FOLDER / f"{name}.ini").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def find(recipe: str) -> Path:
    """The file of a recipe's name, or the file at that path; SettingsError if there is neither."""
    if recipe in names():
        return _FOLDER / f"{recipe}.ini"
    path = user_path(recipe)
    if os.path.isfile(path):
        return path.resolve()
    close = difflib.get_close_matches(recipe, names(), 1)
    raise SettingsError(
        f"--recipe {recipe}: neither a recipe ({', '.join(names())}) nor a file"
        + (f"; did you mean {close[0]}?" if close else "")
    )


def read(recipe: str) -> RecipeFile:
    """The recipe of that name or path, with what it is based on.

    Raises SettingsError, with file and line, for a section or setting that is unknown and a value of a wrong type.
    """
    path = find(recipe)
    try:
        text = path.read_text(encoding="utf-8")
        parser = configparser.ConfigParser(
            interpolation=None, default_section="", delimiters=("=",), inline_comment_prefixes=("#",)
        )
        parser.read_string(text, source=str(path))
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise SettingsError(f"{path}: cannot be read as a recipe: {error}") from error
    settings: dict[str, Any] = {}
    base = recipe if recipe in DATA_RECIPES else "auto"
    for section in parser.sections():
        if section not in ("recipe", *SECTIONS):
            raise SettingsError(_wrong(path, text, section, None, f"sections are recipe, {', '.join(SECTIONS)}"))
        for key, value in parser.items(section):
            if (section, key) == ("recipe", "base"):
                base = value
                continue
            name = key.replace("-", "_")
            kind = SECTIONS.get(section, {}).get(name)
            if kind is None:
                raise SettingsError(_wrong(path, text, section, key, _unknown(section, name)))
            try:
                settings[name] = _typed(reader(kind), value)
            except ValueError as error:
                raise SettingsError(_wrong(path, text, section, key, str(error))) from error
    if base == "auto" or base in DATA_RECIPES:
        return RecipeFile(base, settings)
    if base not in names():
        raise SettingsError(_wrong(path, text, "recipe", "base", f"is auto or one of {', '.join(names())}"))
    below = read(base)
    return RecipeFile(below.base, below.settings | settings)


def _typed(read_value: Callable[[str], Any], text: str) -> Any:
    if not text:
        raise ValueError("has no value; leave the line out")
    return read_value(text)


def _unknown(section: str, name: str) -> str:
    for other, settings in SECTIONS.items():
        if name in settings:
            return f"belongs in [{other}]"
    known = tuple(SECTIONS.get(section, ("base",)))
    close = difflib.get_close_matches(name, known, 1)
    return "is unknown" + (f"; did you mean {close[0]}?" if close else f"; [{section}] has {', '.join(known)}")


def _wrong(path: Path, text: str, section: str, key: str | None, what: str) -> str:
    """The message, with the line of the section or of the key in it."""
    here = ""
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\[([^]]+)\]", line):
            here = header[1]
            if key is None and here == section:
                return f"{path}, line {number}: [{section}] is no section of a recipe; {what}"
        elif here == section and key is not None and re.match(rf"{re.escape(key)}\s*=", line, re.IGNORECASE):
            return f"{path}, line {number}, [{section}]: {key} {what}"
    return f"{path}, [{section}]: {key} {what}"


def to_ini(settings: Mapping[str, Any], base: str) -> str:
    """A recipe file of these settings; those that are None, or empty text, are left out."""
    parts = [f"[recipe]\nbase = {base}\n"]
    for section, known in SECTIONS.items():
        lines = [f"{name} = {write(settings[name])}" for name in known if settings.get(name) not in (None, "")]
        if lines:
            parts.append("\n".join([f"[{section}]", *lines, ""]))
    return "\n".join(parts)


#: The recipes in DATA_RECIPES.
RECIPES: dict[str, Recipe] = {name: Recipe.of(read(name).settings) for name in DATA_RECIPES}

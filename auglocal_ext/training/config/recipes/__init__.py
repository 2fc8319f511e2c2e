"""Recipes: settings of experiments in TOML files, one per experiment, which a user may copy and change."""

from __future__ import annotations

import configparser
import difflib
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from ...data.augment import Augmentation
from ...errors import RecipeError, SettingsError
from ...paths import user_path
from ..rule_options import WrongSetting, check_table, read_head
from ..settings import PYTHON_ALONE, SETTINGS, TABLES
from ..values import checked, said, to_toml
from .toml_lines import line_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FOLDER = Path(__file__).parent

#: The recipes that hold a data set's training alone and no network or rule: what ``auto`` chooses from.
DATA_RECIPES = ("cifar10", "svhn", "stl10", "imagenet", "masks", "text")


@dataclass(frozen=True)
class Recipe:
    """How a run is optimised, and how its images are augmented.

    Images: SGD with Nesterov momentum, a cosine schedule stepped per epoch; weight decay acts on every parameter,
    BatchNorm's and biases included, as in AugLocal's released code. Text: AdamW, a cosine stepped per step after
    ``warmup_steps``, gradients clipped to ``clip_norm``; there is no augmentation, and ``warmup`` is 0.
    """

    epochs: int
    batch_size: int
    lr: float
    warmup: int
    augmentation: Augmentation | None
    weight_decay: float
    momentum: float | None = None
    clip_norm: float | None = None
    warmup_steps: int | None = None

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Recipe:
        """From settings; those of images, or of text, may be missing. ValueError for an augmentation that cannot be."""
        own = [field.name for field in fields(cls) if field.name not in ("augmentation", "warmup")]
        names = [field.name for field in fields(Augmentation)]
        augmented = any(settings.get(name) is not None for name in names)
        return cls(
            warmup=settings.get("warmup") or 0,
            augmentation=Augmentation(**{name: settings[name] for name in names}) if augmented else None,
            **cast("Any", {name: settings.get(name) for name in own}),
        )


@dataclass(frozen=True)
class RecipeFile:
    """What a recipe file says: the data set's recipe it is based on (or "auto"), and settings of its own."""

    base: str
    settings: dict[str, Any]


def names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def title(name: str) -> str:
    """The first line of a recipe that comes with the package, which says what it is."""
    return (_FOLDER / f"{name}.toml").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")


def find(recipe: str) -> Path:
    """The file of a recipe's name, or the file at that path; SettingsError if there is neither."""
    if recipe in names():
        return _FOLDER / f"{recipe}.toml"
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

    A recipe that names another rule than its base has none of the options of the base's rule.

    Raises:
        SettingsError: if there is no such recipe.
        RecipeError: with file, line, table and key, for a table or setting that is unknown, and for a value of a wrong
            type, or out of its range.
    """
    path = find(recipe)
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows begin a file with a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}") from error
    try:
        tables = tomllib.loads(text)
        base, settings = _settings(tables)
        if base is None:
            base = recipe if recipe in DATA_RECIPES else "auto"
        below = RecipeFile(base, {}) if base == "auto" or base in DATA_RECIPES else read(base)
        whole = _over(below.settings, settings)
        if settings.keys() & TABLES["rule"].keys():
            check_table(whole.get("rule"), {name: whole[name] for name in TABLES["rule"] if name in whole})
    except WrongSetting as error:
        raise RecipeError(_placed(path, text, error)) from error
    except RecursionError as error:
        raise RecipeError(f"{path}: cannot be read as a recipe: its values are nested too deeply") from error
    except tomllib.TOMLDecodeError as error:
        hint = f". {_INI}" if _is_ini(text) else ""
        raise RecipeError(f"{path}: cannot be read as a recipe: {error}{hint}") from error
    except ValueError as error:
        if (digits := re.search(r"\d[\d_]{4000}", text)) is None:
            raise
        line = text.count("\n", 0, digits.start()) + 1
        raise RecipeError(f"{path}, line {line}: a number has more digits than Python reads: {error}") from error
    return RecipeFile(below.base, whole)


def _over(below: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` and what those below them say of the rest, the options of another rule aside."""
    if settings.get("rule", below.get("rule")) != below.get("rule"):
        below = {name: value for name, value in below.items() if name not in TABLES["rule"]}
    return {**below, **settings}


_INI = (
    "It may be an INI file, and recipes are TOML: put text in quotes and lists in brackets (modules = [7, 15, 27]), "
    "write true and false for yes and no, and a rule as head as a table [rule.head] with rule = its name. The option "
    "--config prints the settings of a command as a recipe"
)


def _is_ini(text: str) -> bool:
    parser = configparser.ConfigParser(interpolation=None, default_section="", inline_comment_prefixes=("#",))
    try:
        parser.read_string(text)
    except configparser.Error:
        return False
    return any(section in TABLES for section in parser.sections())


def _settings(tables: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The name of what a recipe is based on, if it says so, and its settings; WrongSetting for what they cannot be."""
    base: str | None = None
    settings: dict[str, Any] = {}
    for table, content in tables.items():
        if table not in ("recipe", *TABLES):
            raise WrongSetting(table, "", f"is no table of a recipe; tables are recipe, {', '.join(TABLES)}")
        if not isinstance(content, dict):
            raise WrongSetting(table, "", f"is a table, got {said(content)}")
        for name, value in content.items():
            if (table, name) == ("recipe", "base"):
                if value != "auto" and value not in names():
                    what = f"expected auto or one of {', '.join(names())}, got {said(value)}"
                    raise WrongSetting(table, name, what)
                base = value
                continue
            kind = TABLES.get(table, {}).get(name)
            if kind is None:
                raise WrongSetting(table, name, _unknown(table, name))
            try:
                settings[name] = read_head(value, as_text=False) if name == "head" else checked(kind, value)
            except ValueError as error:
                raise WrongSetting(table, name, str(error)) from error
            if (problem := SETTINGS[name].problem(settings[name])) is not None:
                raise WrongSetting(table, name, problem)
    return base, settings


def _unknown(table: str, name: str) -> str:
    for other, settings in TABLES.items():
        if name in settings:
            return f"belongs in [{other}]"
    if name in PYTHON_ALONE:
        return PYTHON_ALONE[name]
    known = tuple(TABLES.get(table, ("base",)))
    close = difflib.get_close_matches(name, known, 1)
    return "is unknown" + (f"; did you mean {close[0]}?" if close else f"; [{table}] has {', '.join(known)}")


def _placed(path: Path, text: str, error: WrongSetting) -> str:
    """The message with file and line."""
    line = line_of(text, [*error.table.split("."), *([error.key] if error.key else [])])
    return f"{path}, {error}" if line is None else f"{path}, line {line}, {error}"


def write_recipe(settings: Mapping[str, Any], base: str) -> str:
    """A recipe file of these settings; those that are None, or empty text, are left out."""
    parts = [f"[recipe]\nbase = {to_toml(base)}\n"]
    for table, known in TABLES.items():
        parts += _table(table, {name: settings[name] for name in known if settings.get(name) not in (None, "")})
    return "\n".join(parts)


def _table(name: str, values: Mapping[str, Any]) -> list[str]:
    """The text of a table and of those in it."""
    lines = [f"{key} = {to_toml(value)}" for key, value in values.items() if not isinstance(value, dict)]
    parts = ["\n".join([f"[{name}]", *lines, ""])] if lines else []
    for key, value in values.items():
        if isinstance(value, dict):
            parts += _table(f"{name}.{key}", value)
    return parts


#: The recipes in DATA_RECIPES.
RECIPES: dict[str, Recipe] = {name: Recipe.of(read(name).settings) for name in DATA_RECIPES}

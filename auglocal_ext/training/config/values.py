"""Values of settings: as text on the command line, and as TOML in recipes."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

_BOOLEANS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}


def kinds_of(hint: Any) -> list[Any]:
    """The types that an annotation allows, None aside."""
    union = get_origin(hint) in (Union, UnionType)
    return [kind for kind in (get_args(hint) if union else (hint,)) if kind is not NoneType]


def reader(hint: Any) -> Callable[[str], Any]:
    """What turns text into a value of the annotated type, None aside; it raises ValueError and says what it expects.

    Types: bool (``yes``, ``no``), int, float, str, tuples of floats (``5, 0.05``), and ``int | tuple[int, ...]``,
    where a comma makes the tuple (``16``; ``3,5,8``; ``15,``).
    """
    kinds = kinds_of(hint)
    tuples = [get_args(kind)[0] for kind in kinds if get_origin(kind) is tuple]
    if int in kinds and tuples:
        return _count_or_indices
    if tuples:
        return _floats
    return {bool: _boolean, int: _integer, float: _float}.get(kinds[0], str)


def write(value: Any) -> str:
    """The text that ``reader`` reads back as ``value``."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, tuple | list):
        return ",".join(write(part) for part in value) + ("," if len(value) == 1 else "")
    return str(value)


def checked(hint: Any, value: Any) -> Any:
    """A value out of a TOML file as one of the annotated type; ValueError says what was expected and what came.

    Types as for ``reader``, tuples of whole numbers, and ``str | dict``, which is not looked into. Lists become tuples,
    and whole numbers are floats where these are expected.
    """
    kinds = kinds_of(hint)
    for kind in kinds:
        items = get_args(kind)[0] if get_origin(kind) is tuple else None
        if items is None and _is(kind, value):
            return kind(value) if kind is float else value
        if items is not None and isinstance(value, list | tuple) and value and all(_is(items, each) for each in value):
            return tuple(map(items, value))
    raise ValueError(f"expected {' or '.join(map(_expected, kinds))}, got {said(value)}")


def _is(kind: Any, value: Any) -> bool:
    if kind is float:
        return type(value) in (int, float) and abs(value) < math.inf and abs(value) <= sys.float_info.max
    return type(value) is kind and value != ""


def _expected(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list of {'whole ' if get_args(kind)[0] is int else ''}numbers"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes"}.get(kind, "a table")


def to_toml(value: Any) -> str:
    """A value as a TOML file has it; a table in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(to_toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {to_toml(each)}' for key, each in value.items())} }}"
    return str(value)


def said(value: Any) -> str:
    """A value of a TOML file for a message: of a long one the beginning."""
    try:
        text = to_toml(value)
    except ValueError:  # Python writes no number of so many digits
        return "a number of thousands of digits"
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text)} characters)"


def _boolean(text: str) -> bool:
    if text.lower() not in _BOOLEANS:
        raise ValueError(f"expected yes or no, got {text!r}")
    return _BOOLEANS[text.lower()]


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"expected a whole number, got {text!r}") from None


def _float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"expected a number, got {text!r}") from None
    if not math.isfinite(value):
        raise ValueError(f"expected a finite number, got {text!r}")
    return value


def _floats(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.rstrip(", ").split(","))
    except ValueError:
        raise ValueError(f"expected numbers joined by commas, got {text!r}") from None
    if not all(map(math.isfinite, values)):
        raise ValueError(f"expected finite numbers, got {text!r}")
    return values


def _count_or_indices(text: str) -> int | tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.rstrip(", ").split(","))
    except ValueError:
        raise ValueError(f"expected a number, or numbers joined by commas, got {text!r}") from None
    return numbers if "," in text else numbers[0]

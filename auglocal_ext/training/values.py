"""Settings as text, as they stand in recipe files, in a head's options and on the command line."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

_BOOLEANS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}


def reader(hint: Any) -> Callable[[str], Any]:
    """What turns text into a value of the annotated type, None aside; it raises ValueError and says what it expects.

    Types: bool (``yes``, ``no``), int, float, str, tuples of floats (``5, 0.05``), and ``int | tuple[int, ...]``,
    where a comma makes the tuple (``16``; ``3,5,8``; ``15,``).
    """
    union = get_origin(hint) in (Union, UnionType)
    kinds = [kind for kind in (get_args(hint) if union else (hint,)) if kind is not NoneType]
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


def user_path(text: str | os.PathLike[str]) -> Path:
    """The path with ``~`` and ``~user`` replaced; those of an unknown user stay."""
    return Path(os.path.expanduser(text))


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

"""The setting ``recompute`` as the command line and recipes have it, text such as ``all``, ``3`` or ``3,3,all``."""

from __future__ import annotations

from typing import Literal

from ...local_modules import RECOMPUTE, Recompute

_PEAK = "peak"

#: What the text may say.
ALLOWED = (
    f"one of {', '.join(RECOMPUTE)}, {_PEAK}, or a number n of at least 1, for the first n layers of every local "
    f"module, or a list with one of these but {_PEAK} for each, such as 3,3,all"
)


def read_recompute(text: str) -> Recompute | Literal["peak"] | tuple[Recompute, ...]:
    """``"peak"``, a choice for all local modules, or, where commas join several, one for each.

    Raises:
        ValueError: for anything else.
    """
    if text.strip() == _PEAK:
        return "peak"
    words = [word.strip() for word in text.removesuffix(",").split(",")]
    if not all(word in RECOMPUTE or (word.isascii() and word.isdecimal() and 0 < int(word) < 2**31) for word in words):
        raise ValueError(f"expected {ALLOWED}; got {text!r}")
    choices = tuple(word if word in RECOMPUTE else int(word) for word in words)
    return choices if "," in text else choices[0]


def problem_of_recompute(text: object) -> str | None:
    """Why ``text`` is no value of the setting; None if it is one."""
    if not isinstance(text, str):
        return f'must be text, such as "peak", "3" or "3,3,all", got {text!r}'
    try:
        read_recompute(text)
    except ValueError:
        return f"is {ALLOWED}; not {text!r}"
    return None

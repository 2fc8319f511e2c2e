"""Options as the command line spells them: numbers and sizes that it reads, messages of the library about options."""

from __future__ import annotations

import argparse
import re
from collections.abc import Collection

from ..planning.memory import parse_bytes

_LIMIT = 2**63

# Calls are the library's own: MAN(momentum=0.9, head=AugLocal(depth=2)). Heads in heads have calls in calls.
_WITHIN = r"[^()]*"
for _ in range(5):
    _WITHIN = rf"[^()]*(?:\({_WITHIN}\)[^()]*)*"
_CALL = rf"[A-Z]\w*\({_WITHIN}\)"
# Where not an option's value, quoted text is what somebody gave.
_QUOTED = r"""(?<!\w)(?:'[^']*'|"[^"]*")"""
# An option with or without its value, or the name of one where that is no word of English. What stands within a head's
# text, such as infopro:weights=1,2, is an option of that head.
_OPTION = rf"""(?<![-:,\w./("'])({{names}})=({_CALL}|"[^"]*"|'[^']*'|\([^()]*\)|\[[^\[\]]*\]|-?\w[\w.+-]*)?"""
_NAME = r"""(?<![\w=./\"'-])({long})(?![\w=(.\"'])"""


def whole(text: str) -> int:
    """A whole number that torch can count with, as argparse reads it."""
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if not -_LIMIT <= number < _LIMIT:
        raise argparse.ArgumentTypeError(f"expected a number below 2^63, got {text}")
    return number


def seed(text: str) -> int:
    """A seed of random numbers, as argparse reads it."""
    try:
        number = int(text)
    except ValueError:
        number = -1
    if not 0 <= number < 2 * _LIMIT:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to 2^64 - 1, got {text}")
    return number


def size(text: str) -> str:
    """A number of bytes, ``400MB`` or ``0.4GiB``, as argparse reads it."""
    try:
        parse_bytes(int(text) if text.isdecimal() else text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected bytes, such as 400MB (1 MB = 1e6 bytes) or 0.4GiB (1 GiB = 2**30 bytes), got {text!r}"
        ) from None
    return text


def too_large(error: RuntimeError) -> str:
    """A line for sizes that torch cannot count or this machine cannot hold; raises ``error`` if it is another one."""
    first = str(error).splitlines()[0]
    if not re.search("allocate memory|overflow", first):
        raise error
    return f"the network or the batch is too large to be made here: {first}"


def as_options(message: str, options: Collection[str], on_off: Collection[str] = ()) -> str:
    """``message`` with ``recompute="peak"`` as ``--recompute peak``, and ``memory_budget`` as ``--memory-budget``.

    Args:
        message: of the library, which names arguments of Python.
        options: names of the command's options, with underscores.
        on_off: those that take ``on`` and ``off``; of others ``True`` is ``--NAME`` and ``False`` is ``--no-NAME``.
    """

    def option(found: re.Match[str]) -> str:
        name, value = found[1] or found[3], found[2]
        if name is None:
            return found[0]
        flag = name.replace("_", "-")
        if name == "fused":
            return "--eager" if value == "False" else f"--{flag}"
        if value in ("True", "False"):
            if name in on_off:
                return f"--{flag} {'on' if value == 'True' else 'off'}"
            return f"--{flag}" if value == "True" else f"--no-{flag}"
        if value is not None and not re.fullmatch(_CALL, value):
            value = re.sub("[\"'()\\[\\]]", "", value).replace(", ", ",")
        return f"--{flag} {value or ''}".rstrip()

    names = sorted(options, key=len, reverse=True)
    option_or_value = _OPTION.format(names="|".join(map(re.escape, names)))
    long = "|".join(re.escape(name) for name in names if "_" in name)
    return re.sub(f"{_CALL}|{_QUOTED}|{option_or_value}|{_NAME.format(long=long)}", option, message)

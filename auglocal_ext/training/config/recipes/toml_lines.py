"""On which line a TOML file says a key, which its parser does not tell."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NAME = r"""(?:[\w-]+|"[^"]*"|'[^']*')"""
_DOTTED = rf"{_NAME}(?:\s*\.\s*{_NAME})*"
_HEADER = re.compile(rf"\s*\[\s*({_DOTTED})\s*\]\s*(?:#.*)?")
_ENTRY = re.compile(rf"\s*({_DOTTED})\s*=")


def line_of(text: str, keys: Sequence[str]) -> int | None:
    """The line, counted from 1, of a key, or else of the closest table around it; None where neither has one.

    Args:
        text: of a file.
        keys: the tables around the key and the key itself; only tables for a table.
    """
    line: int | None = None
    here: tuple[str, ...] = ()
    found = 0
    for number, content in enumerate(text.split("\n"), 1):
        if header := _HEADER.fullmatch(content.rstrip("\r")):
            path = here = _names(header[1])
        elif entry := _ENTRY.match(content):
            path = (*here, *_names(entry[1]))
        else:
            continue
        if len(path) > found and path == tuple(keys[: len(path)]):
            line, found = number, len(path)
    return line


def _names(dotted: str) -> tuple[str, ...]:
    return tuple(name.strip("\"'") for name in re.findall(_NAME, dotted))

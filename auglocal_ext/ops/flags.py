"""What an op says of a flag that is neither True nor False, which would otherwise count as one of them."""

from __future__ import annotations

from typing import Any


def not_a_flag(name: str, value: Any) -> TypeError:
    """The error, to be raised where ``value is not True and value is not False``: ops ask this at every call."""
    return TypeError(f"expected {name} as True or False, got {value!r} of type {type(value).__name__}")

"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(text: str | os.PathLike[str]) -> Path:
    """The path with ``~`` and ``~user`` replaced; those of an unknown user stay."""
    return Path(os.path.expanduser(text))

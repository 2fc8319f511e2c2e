"""Printing what a command has found."""

from __future__ import annotations

import os
import sys


def show(text: str) -> None:
    """Print ``text``; a reader that has enough of it, ``head`` for one, may leave early."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # What is left in the buffer must not fail once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

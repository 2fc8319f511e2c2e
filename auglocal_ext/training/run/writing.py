"""Files of a run folder: replaced whole or not at all, and one line that says why one cannot be written."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ...distributed import checkpoint_files
from ..errors import OutputError


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` when the block ends: ``path`` is the old or the new one at any
    moment, also after a crash. One process at a time may do this.

    Raises:
        OutputError: if it cannot be written; ``path`` is as it was.
    """
    with to(path), checkpoint_files.replaced(path) as file:
        yield file


@contextmanager
def to(path: Path) -> Iterator[None]:
    """OutputError for what the system raises while the block writes ``path``."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = checkpoint_files.of_system(error)
        if cause is None:
            raise
        raise OutputError(f"{path} cannot be written: {cause.strerror or cause}") from error


def remove_partial(folder: Path) -> None:
    """Delete what a killed process had begun to write in a run folder."""
    with to(folder):
        for path in folder.glob(f"*{checkpoint_files.PARTIAL}"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

"""Files of a run folder: replaced whole or not at all, and one line that says why one cannot be written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from .errors import OutputError

_PARTIAL = ".partial"


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` when the block ends: ``path`` is the old or the new one at any
    moment, also after a crash. One process at a time may do this.

    Raises:
        OutputError: if it cannot be written; ``path`` is as it was.
    """
    temporary = path.with_name(path.name + _PARTIAL)
    with to(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if os.name == "posix":  # the rename itself lives in the folder
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextmanager
def to(path: Path) -> Iterator[None]:
    """OutputError for what the system raises while the block writes ``path``."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = _of_system(error)
        if cause is None:
            raise
        raise OutputError(f"{path} cannot be written: {cause.strerror or cause}") from error


def _of_system(error: BaseException | None) -> OSError | None:
    """torch.save raises a RuntimeError of its own over that of a full disk."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def remove_partial(folder: Path) -> None:
    """Delete what a killed process had begun to write in a run folder."""
    with to(folder):
        for path in folder.glob(f"*{_PARTIAL}"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

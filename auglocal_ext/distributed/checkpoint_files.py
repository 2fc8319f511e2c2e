"""Files of checkpoints: replaced whole or not at all, and read only as they were written.

Checksums are CRC-32: they find damage, not forgery.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

#: What the name of a half-written file ends with.
PARTIAL = ".partial"


@contextmanager
def replaced(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of ``path`` when the block ends: ``path`` is the old or the new one at any
    moment, also after a crash. One process at a time may do this.
    """
    temporary = path.with_name(path.name + PARTIAL)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def of_system(error: BaseException | None) -> OSError | None:
    """The system's error under one of torch's own, as torch raises it over that of a full disk; None without one."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def sync(folder: Path) -> None:
    """Write a folder itself to the disk: a rename lives in the folder around it."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def checksum(path: Path) -> int:
    """Of the whole file."""
    found = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            found = zlib.crc32(block, found)
    return found


def load_checked(path: Path) -> Any:
    """What ``torch.save`` wrote, tensors on the CPU, without executing anything; ValueError if it is damaged.

    torch writes a checksum of each part of the file and does not compare it.
    """
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise changed(damaged)
    return torch.load(path, map_location="cpu", weights_only=True)


def changed(file: str) -> ValueError:
    """The error for a file, or a part of one, that is damaged."""
    return ValueError(f"{file} has another checksum than when it was written")


@contextmanager
def readable(path: Path, error: type[Exception]) -> Iterator[None]:
    """``error`` for whatever reading ``path`` raises: the errors of damaged files are of no particular kind."""
    try:
        yield
    except error:
        raise
    except Exception as raised:
        raise error(f"{path}: not a readable checkpoint ({reason(raised)})") from raised


def reason(error: BaseException) -> str:
    """An error in one line: what it says first, and its kind where that says nothing alone."""
    lines = str(error).splitlines()
    said = lines[0] if lines else ""
    return said if " " in said else f"{type(error).__name__}: {said}" if said else type(error).__name__

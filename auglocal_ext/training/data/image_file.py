"""Image files as they lie in folders: found, opened, and decoded to 8 bits by the range of their values."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

# What a file may hold, whatever its ending: Pillow decodes these itself. For others, such as EPS, it starts programs.
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
_16_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def files_below(folder: str | os.PathLike[str], endings: tuple[str, ...]) -> list[str]:
    """Paths with these endings in a folder and all below it, links followed, in torchvision's order.

    Whatever is no folder is among them, also a link that leads nowhere: :func:`opened` refuses what is no file.

    Raises:
        DataError: for a link to a folder that contains it, and for a folder that cannot be read.
    """
    found = sorted(_folders(os.fspath(folder), ()))
    return [os.path.join(where, name) for where, names in found for name in sorted(names) if _ends(name, endings)]


def _ends(name: str, endings: tuple[str, ...]) -> bool:
    return name.lower().endswith(endings)


def _folders(folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[tuple[str, list[str]]]:
    """Each folder with the names in it that are no folders."""
    with readable(folder):
        status = os.stat(folder)
        own = (status.st_dev, status.st_ino)
        if own in above:
            raise DataError(f"{folder}: a link to a folder that contains it; remove the link")
        with os.scandir(folder) as entries:
            inside = [(entry, is_folder(entry)) for entry in entries]
    yield folder, [entry.name for entry, below in inside if not below]
    for entry, below in inside:
        if below:
            yield from _folders(entry.path, (*above, own))


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; a link that leads nowhere is none, nor is one to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


@contextmanager
def readable(path: str | os.PathLike[str]) -> Iterator[None]:
    """DataError for what the system raises while the block reads folders and files, ``path`` or below."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or os.fspath(path)} cannot be read: {error.strerror or error}") from error


@contextmanager
def opened(path: str) -> Iterator[Image]:
    """The image in a file, by Pillow; only its header has been read.

    Raises:
        DataError: if it is no image in a format that Pillow decodes itself, or one whose values have no known range;
            also for what the block raises in decoding it.
    """
    from PIL import Image

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for ever
            raise OSError("not a regular file")
        with Image.open(path, formats=_FORMATS) as image:
            if _range(image) is None:
                raise ValueError(f"values of mode {image.mode} have no known range: save it with 8 or 16 bits")
            yield image
    except DataError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(unreadable(path, error)) from error


def unreadable(path: str, error: Exception) -> str:
    """What is said of a file that is no image."""
    reason: object = getattr(error, "strerror", None) or error
    if type(error).__name__ == "UnidentifiedImageError":
        reason = f"cannot identify image file; expected {', '.join(_FORMATS)}"
    size = os.path.getsize(path) if os.path.exists(path) else 0
    return f"{path}: unreadable image ({reason}; {size} bytes); replace or remove this file"


def _range(image: Image) -> int | None:
    """The largest value there can be; None if that is not known."""
    if image.mode in _16_BIT:
        return 65535
    if image.mode == "I":  # 16 bits in PNG and PGM; a TIFF's may be anything
        return 65535 if image.format in ("PNG", "PPM") else None
    return None if image.mode == "F" else 255


def rgb(image: Image) -> Tensor:
    """(3, H, W) uint8; values of 16 bits are divided by 257 and rounded."""
    if _range(image) == 65535:
        values = np.asarray(image).astype(np.int64)
        grey = torch.from_numpy(((values + 128) // 257).clip(0, 255).astype(np.uint8))
        return grey.expand(3, -1, -1)
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)

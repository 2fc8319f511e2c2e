"""The classes of a data set of images and masks: named in ``classes.txt`` or counted, after every mask is checked."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import DataError
from .folder import few, run_chunks
from .image_file import opened, rgb
from .mask_file import IGNORED, read_mask
from .mask_pairs import PairList

CLASSES = "classes.txt"

_CHUNK = 32
_EXIF_ORIENTATION = 0x0112


def read_classes(root: Path) -> tuple[str, ...] | None:
    """The names in ``classes.txt``, one per line from class 0 on; None if there is no such file."""
    path = root / CLASSES
    if not path.is_file():
        return None
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text in UTF-8 ({error})") from error
    if not 2 <= len(names) <= IGNORED or "" in names or len(set(names)) < len(names):
        raise DataError(
            f"{path}: expected the names of 2 to {IGNORED} classes, one per line, in the order of their values, no "
            f"line empty and no name twice; got {len(names)} lines: {few([*map(repr, names)])}"
        )
    return tuple(names)


def check_pairs(pairs: PairList, classes: int, *, workers: int, progress: bool, label: str) -> list[int]:
    """Decode all images and masks; the class indices that occur, ascending, without IGNORED.

    Raises DataError, naming the file, for one that is damaged, sizes that differ, and an index of ``classes`` or more.
    """
    seen = torch.zeros(IGNORED, dtype=torch.bool)
    for found in run_chunks(_Pairs(pairs, classes), _CHUNK, len(pairs.paths), workers, progress, label):
        seen |= found
    return [int(value) for value in seen.nonzero()]


class _Pairs(Dataset):
    """Item i: which class indices occur in the i-th run of pairs (255,); then an error as ``run_chunks`` takes it."""

    def __init__(self, pairs: PairList, classes: int):
        self._pairs, self._classes = pairs, classes

    def __len__(self) -> int:
        return -(-len(self._pairs.paths) // _CHUNK)

    def __getitem__(self, index: int) -> tuple[Tensor, str, str]:
        seen = torch.zeros(IGNORED, dtype=torch.bool)
        here = slice(index * _CHUNK, (index + 1) * _CHUNK)
        for path, mask in zip(self._pairs.paths[here], self._pairs.masks[here], strict=True):
            try:
                seen |= _checked(path, mask, self._classes)
            except DataError as error:
                return seen, str(error), "unreadable"
        return seen, "", ""


def _checked(path: str, mask_path: str, classes: int) -> Tensor:
    with opened(path) as file:
        turned = file.getexif().get(_EXIF_ORIENTATION, 1)
        image = rgb(file)
    mask = read_mask(mask_path)
    if image.shape[1:] != mask.shape:
        (rows, columns), (height, width) = mask.shape, image.shape[1:]
        raise DataError(
            f"{mask_path}: the mask is {columns} pixels wide and {rows} high, its image {path} {width} wide and "
            f"{height} high; they must be the same size"
        )
    if turned != 1:
        raise DataError(
            f"{path}: EXIF orientation {turned} rotates or mirrors this image for display, and it is unknown whether "
            "its mask needs the same: save the image in its displayed orientation, without this tag"
        )
    wrong = (mask >= classes) & (mask != IGNORED)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise DataError(
            f"{mask_path}: the value {int(mask[row, column])} at row {row}, column {column} is no class: expected 0 to "
            f"{classes - 1}, or {IGNORED} for ignored pixels"
        )
    return torch.bincount(mask.flatten(), minlength=IGNORED + 1)[:IGNORED] > 0


def classes_of(root: Path, train: PairList, test: PairList, *, workers: int, progress: bool) -> tuple[str, ...]:
    """Check all pairs; the names of the classes: those in ``classes.txt``, or the indices in the training masks.

    Raises DataError for pairs that do not fit, and for masks whose values are no class indices.
    """
    names = read_classes(root)
    limit = IGNORED if names is None else len(names)
    seen = check_pairs(train, limit, workers=workers, progress=progress, label="checking train")
    folder = root / "train" / "masks"
    if len(seen) < 2:
        raise DataError(
            f"{folder}: at least two classes are needed, found the values {few([*map(str, seen)])} ({IGNORED} marks "
            "ignored pixels: in masks of 0 and 255, write 1 for 255)"
        )
    if names is None:
        if seen != list(range(len(seen))):
            raise DataError(
                f"{folder}: classes are numbered from 0 without gaps, but the masks hold the values "
                f"{', '.join(map(str, seen))}: renumber them or, if some classes merely do not occur, name all "
                f"classes in {root / CLASSES}, one per line"
            )
        names = tuple(map(str, seen))
    if not check_pairs(test, len(names), workers=workers, progress=progress, label="checking test"):
        raise DataError(f"{root / 'test' / 'masks'}: every pixel has the value {IGNORED}, so none can be tested")
    return names

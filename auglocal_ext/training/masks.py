"""Folders of images and masks, ``train/images/*`` beside ``train/masks/*.png``: paired by name and checked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import DataError
from .folder import IMAGE_ENDINGS, few, no_split, run_chunks
from .image_file import files_below, opened, rgb

IGNORED = 255
"""The value of pixels that count nowhere."""

LAYOUT = "expected train/images/<name>.jpg with train/masks/<name>.png, and the same in test/"
CLASSES = "classes.txt"

_CHUNK = 32
_EXIF_ORIENTATION = 0x0112
# What Pillow multiplies grey values of fewer than 8 bits by.
_SCALES = {"L;2": 85, "L;4": 17}


@dataclass(frozen=True)
class PairList:
    """The images of one split and the mask of each, sorted by name."""

    paths: tuple[str, ...]
    masks: tuple[str, ...]

    def part(self, indices: Sequence[int]) -> PairList:
        """Some of the pairs."""
        return PairList(tuple(self.paths[i] for i in indices), tuple(self.masks[i] for i in indices))


def has_masks(root: Path) -> bool:
    """Whether ``root`` is laid out for images and masks."""
    return any((root / split / "images").is_dir() and (root / split / "masks").is_dir() for split in ("train", "test"))


def list_pairs(root: Path) -> tuple[PairList, PairList]:
    """Train and test pairs below ``root``; DataError for a missing folder, and for what has no counterpart."""
    return _list_split(root / "train"), _list_split(root / "test")


def _list_split(folder: Path) -> PairList:
    if not folder.is_dir():
        raise no_split(folder, LAYOUT)
    images, masks = (_by_name(folder / part) for part in ("images", "masks"))
    other = [path for path in masks.values() if not path.lower().endswith(".png")]
    if other:
        raise DataError(
            f"{folder / 'masks'}: masks are PNG files, palette or 8-bit grey, because lossy formats change class "
            f"indices; found {few(other)}"
        )
    no_mask = [images[name] for name in sorted(set(images) - set(masks))]
    no_image = [masks[name] for name in sorted(set(masks) - set(images))]
    if no_mask or no_image:
        raise DataError(
            f"{folder}: an image and its mask have the same name up to the ending; images without a mask: "
            f"{few(no_mask)}; masks without an image: {few(no_image)}"
        )
    names = sorted(images)
    return PairList(tuple(images[name] for name in names), tuple(masks[name] for name in names))


def _by_name(folder: Path) -> dict[str, str]:
    """The image files in a folder and below it, by their path in it without the ending."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; {LAYOUT}")
    found: dict[str, str] = {}
    for path in files_below(folder, IMAGE_ENDINGS):
        name = os.path.splitext(os.path.relpath(path, folder))[0]
        if name in found:
            raise DataError(f"{found[name]} and {path} have the same name up to the ending; remove one")
        found[name] = path
    if not found:
        raise DataError(f"{folder}: holds no images; expected files ending in {', '.join(IMAGE_ENDINGS)}")
    return found


def read_classes(root: Path) -> tuple[str, ...] | None:
    """The names in ``classes.txt``, a line for each class from 0 on; None if there is no such file."""
    path = root / CLASSES
    if not path.is_file():
        return None
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as text in UTF-8 ({error})") from error
    if not 2 <= len(names) <= IGNORED or "" in names or len(set(names)) < len(names):
        raise DataError(
            f"{path}: expected the names of 2 to {IGNORED} classes, each on a line of its own, in the order of their "
            f"values, no line empty and no name twice; got {len(names)} lines: {few([*map(repr, names)])}"
        )
    return tuple(names)


def read_mask(path: str) -> Tensor:
    """One mask as a tensor (H, W) uint8 of class indices; DataError if it cannot be read or holds no indices."""
    import numpy as np

    with opened(path) as file:
        image: Any = file
        if image.format != "PNG":
            raise DataError(f"{path}: the mask is a {image.format} file in spite of its name; masks are PNG files")
        mode = image.mode
        scale = _SCALES.get(str(image.tile[0][3]), 1) if image.tile else 1
        pixels = np.array(image)
    if mode not in ("P", "L", "1"):
        raise DataError(
            f"{path}: the mask is of Pillow's mode {mode}, but the value of a pixel must be its class: save it as "
            "palette (P) or 8-bit grey (L), with class indices for colours"
        )
    return torch.from_numpy(pixels.astype(np.uint8) // scale)


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
            f"{height} high; they must have one size"
        )
    if turned != 1:
        raise DataError(
            f"{path}: this image is to be shown turned or mirrored (EXIF orientation {turned}), and nothing tells "
            "whether its mask is: save the image as it is to be seen, without that tag"
        )
    wrong = (mask >= classes) & (mask != IGNORED)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        raise DataError(
            f"{mask_path}: the value {int(mask[row, column])} at row {row}, column {column} is no class: expected 0 to "
            f"{classes - 1}, or {IGNORED} for pixels to be ignored"
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
            f"{folder}: at least two classes are needed, found the values {few([*map(str, seen)])} ({IGNORED} is for "
            "pixels to be ignored: of masks of 0 and 255, make the 255 a 1)"
        )
    if names is None:
        if seen != list(range(len(seen))):
            raise DataError(
                f"{folder}: classes are numbered from 0 without gaps, but the masks hold the values "
                f"{', '.join(map(str, seen))}: number them so, or, if some classes only do not occur, name all of them "
                f"in {root / CLASSES}, each on a line of its own"
            )
        names = tuple(map(str, seen))
    if not check_pairs(test, len(names), workers=workers, progress=progress, label="checking test"):
        raise DataError(f"{root / 'test' / 'masks'}: every pixel has the value {IGNORED}, so none can be tested")
    return names

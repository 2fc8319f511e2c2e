"""Which mask belongs to which image: ``train/images/*`` beside ``train/masks/*.png``, paired by name."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError
from .folder import IMAGE_ENDINGS, few, no_split
from .image_file import files_below

LAYOUT = "expected train/images/<name>.jpg with train/masks/<name>.png, and the same in test/"


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
            f"{folder}: an image and its mask need the same name up to the ending; images without a mask: "
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

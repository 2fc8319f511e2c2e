"""Which data set lies in a folder, and its images: in memory where they fit, as files where they do not."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..errors import DataError, SettingsError
from ..paths import user_path
from .folder import FileList, MixedSizes, check_headers, decode, few, list_folder, sampled_sizes
from .image_file import files_below, readable
from .mask_pairs import PairList, has_masks, list_pairs
from .masks import classes_of
from .text import NAME as TEXT
from .text_files import ENDING
from .torchvision_files import MARKS, READERS

MASKS = "masks"
DATASETS = ("auto", "folder", MASKS, *READERS, TEXT)

RESIDENT_BYTES = 4 * 2**30
"""Decoded images up to this size are kept on the device; constant, so that a resumed run decides the same."""


@dataclass(frozen=True)
class ImageArrays:
    """A data set in memory: images (N, 3, H, W) uint8 and labels (N,) int64 of both splits."""

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train_images.shape[1:]
        return (channels, height, width)

    @property
    def train_count(self) -> int:
        return len(self.train_labels)

    @property
    def test_count(self) -> int:
        return len(self.test_labels)


_Files = TypeVar("_Files", FileList, PairList)


@dataclass(frozen=True)
class _ReadFiles(Generic[_Files]):
    """A data set read file by file in every epoch, as images of ``image_size`` x ``image_size``."""

    name: str
    classes: tuple[str, ...]
    train: _Files
    test: _Files
    image_size: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        return (3, self.image_size, self.image_size)

    @property
    def train_count(self) -> int:
        return len(self.train.paths)

    @property
    def test_count(self) -> int:
        return len(self.test.paths)


class ImageFiles(_ReadFiles[FileList]):
    """Images of one class each, read file by file in every epoch and resized."""


class MaskFiles(_ReadFiles[PairList]):
    """Images and their masks, read file by file in every epoch; both keep their proportions."""


Images = ImageArrays | ImageFiles | MaskFiles


def default_workers() -> int:
    """One process per core this process may use, shared with those torchrun has started here; not more than 16."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def load_data(
    path: str | Path,
    dataset: str = "auto",
    *,
    image_size: int | None = None,
    streamed_size: int = 224,
    train_images: int | None = None,
    seed: int = 1234,
    workers: int | None = None,
    progress: bool = True,
) -> Images:
    """The images in ``path``: an image folder, images and masks, or torchvision's CIFAR-10, SVHN or STL-10 files.

    Nothing is downloaded. Image folders of equal-sized images which fit in RESIDENT_BYTES, and torchvision's data sets,
    are decoded once (ImageArrays). Other folders stay files (ImageFiles) and are resized to ``image_size``, or to
    ``streamed_size`` if that is None; so do images with masks (MaskFiles), which are all decoded once to check them.
    ``train_images`` keeps a random part of the training images, chosen by ``seed``.

    Raises DataError, naming the path and what was expected there, before anything is trained.
    """
    root = user_path(path)
    kind = detect(root) if dataset == "auto" else dataset
    if kind == TEXT or kind not in DATASETS:
        known = [name for name in DATASETS if name != TEXT]
        raise SettingsError(f"--dataset is one of {', '.join(known)}, not {kind!r}")
    workers = default_workers() if workers is None else workers
    with readable(root):
        if not root.is_dir():
            missing = "a file, where a folder of images is expected" if root.is_file() else "no such folder"
            raise DataError(f"{root}: {missing}; {_expected()}")
        return _load(root, kind, image_size, streamed_size, train_images, seed, workers, progress)


def _load(
    root: Path,
    kind: str,
    image_size: int | None,
    streamed_size: int,
    train_images: int | None,
    seed: int,
    workers: int,
    progress: bool,
) -> Images:
    if kind == "folder":
        classes, train, test = list_folder(root)
        if train_images is not None:
            keep = _part(len(train.paths), train_images, seed)
            train = FileList(tuple(train.paths[i] for i in keep.tolist()), train.labels[keep])
        return _load_folder(tuple(classes), train, test, image_size, streamed_size, workers, progress)

    if kind == MASKS:
        pairs, tested = list_pairs(root)
        found = classes_of(root, pairs, tested, workers=workers, progress=progress)
        if train_images is not None:
            pairs = pairs.part(_part(len(pairs.paths), train_images, seed).tolist())
        return MaskFiles(MASKS, found, pairs, tested, image_size or streamed_size)

    names, *tensors = READERS[kind](root)
    arrays = ImageArrays(kind, tuple(names), *(tensor.contiguous() for tensor in tensors))
    if image_size is not None and image_size != arrays.input_shape[1]:
        size = " x ".join(map(str, arrays.input_shape[1:]))
        raise SettingsError(f"--image-size {image_size}: {kind} has images of {size}; only folders are resized")
    if train_images is None:
        return arrays
    keep = _part(arrays.train_count, train_images, seed)
    return ImageArrays(
        kind,
        arrays.classes,
        arrays.train_images[keep],
        arrays.train_labels[keep],
        arrays.test_images,
        arrays.test_labels,
    )


def detect(root: Path, *, text: bool = False) -> str:
    """The data set's name by what lies in ``root``; DataError if that is nothing known, or more than one.

    A folder of .txt files is a text; with ``text`` also one that has them in folders below it alone.
    """
    with readable(root):
        return _detected(root, text)


def _detected(root: Path, text: bool) -> str:
    if root.is_file():
        return TEXT
    if not root.is_dir():
        missing = "no such file or folder" if text else "no such folder"
        missing = "neither a file nor a folder" if root.exists() else missing
        raise DataError(f"{root}: {missing}; {_expected()}")
    found = [name for name, (mark, _) in MARKS.items() if (root / mark).exists()]
    if has_masks(root):
        found.insert(0, MASKS)
    elif (root / "train").is_dir() or (root / "test").is_dir():
        found.insert(0, "folder")
    if len(found) == 1:
        return found[0]
    if found:
        raise DataError(f"{root}: holds more than one data set ({', '.join(found)}); choose one with --dataset")

    hints = [f"; unpack {root / archive}" for _, archive in MARKS.values() if archive and (root / archive).is_file()]
    hints += [f"; give its parent folder {root.parent}" for mark, _ in MARKS.values() if root.resolve().name == mark]
    there = sorted(entry.name for entry in os.scandir(root))
    if not hints and (any(name.lower().endswith(ENDING) for name in there) or text and files_below(root, (ENDING,))):
        return TEXT
    raise DataError(f"{root}: no data set recognised; {_expected()}; found {few(there)}" + "".join(hints))


def _expected() -> str:
    marks = ", ".join(f"{mark} ({name})" for name, (mark, _) in MARKS.items())
    return (
        "expected train/<class>/<image> and test/<class>/<image>, images and masks of one name in train/images, "
        f"train/masks, test/images and test/masks, torchvision's {marks}, or a text file or a folder of {ENDING} files"
    )


def _part(count: int, wanted: int, seed: int) -> Tensor:
    if not 2 <= wanted <= count:
        raise SettingsError(f"--train-images must be between 2 and the {count} there are, got {wanted}")
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:wanted].sort().values


def _load_folder(
    classes: tuple[str, ...],
    train: FileList,
    test: FileList,
    image_size: int | None,
    streamed_size: int,
    workers: int,
    progress: bool,
) -> ImageArrays | ImageFiles:
    sizes = sampled_sizes(train.paths) | sampled_sizes(test.paths)
    if len(sizes) == 1:
        ((height, width),) = sizes
        fits = 3 * height * width * (len(train.paths) + len(test.paths)) <= RESIDENT_BYTES
        if fits and image_size in (None, height, width) and (image_size is None or height == width):
            try:
                return ImageArrays(
                    "folder",
                    classes,
                    decode(train, (height, width), workers=workers, progress=progress, label="reading train"),
                    train.labels,
                    decode(test, (height, width), workers=workers, progress=progress, label="reading test"),
                    test.labels,
                )
            except MixedSizes:
                pass  # the sample did not show it
    for files, split in ((train, "train"), (test, "test")):
        check_headers(files, workers=workers, progress=progress, label=f"checking {split}")
    return ImageFiles("folder", classes, train, test, image_size or streamed_size)

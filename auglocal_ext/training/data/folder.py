"""Image folders ``train/<class>/*`` and ``test/<class>/*``: listed, checked, decoded to a uint8 tensor."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import DataError
from ..interrupt import ignore_interrupts
from ..progress_bar import progress_bar
from .image_file import files_below, is_folder, opened, rgb

# The endings torchvision's ImageFolder reads, so that both list the same images.
IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_CHUNK = 256
_LAYOUT = "expected train/<class>/<image> and test/<class>/<image>"


@dataclass(frozen=True)
class FileList:
    """The images of one split: path and class index of each, classes and paths sorted as in ImageFolder."""

    paths: tuple[str, ...]
    labels: Tensor


def list_folder(root: Path) -> tuple[list[str], FileList, FileList]:
    """Class names, train files and test files below ``root``.

    Raises DataError for a missing or empty split or class folder, and for splits with different classes.
    """
    train_classes, train = _list_split(root / "train")
    test_classes, test = _list_split(root / "test")
    if train_classes != test_classes:
        only_train = sorted(set(train_classes) - set(test_classes))
        only_test = sorted(set(test_classes) - set(train_classes))
        raise DataError(
            f"{root}: train/ and test/ must have the same class folders; "
            f"only in train/: {few(only_train)}; only in test/: {few(only_test)}"
        )
    if len(train_classes) < 2:
        hint = "; of images with masks, the masks are in 'masks'" if train_classes == ["images"] else ""
        raise DataError(f"{root / 'train'}: at least two class folders are needed, found {few(train_classes)}{hint}")
    return train_classes, train, test


def _list_split(folder: Path) -> tuple[list[str], FileList]:
    if not folder.is_dir():
        raise no_split(folder, _LAYOUT)
    with os.scandir(folder) as entries:
        inside = list(entries)
    lost = [entry.name for entry in inside if entry.is_symlink() and not os.path.exists(entry.path)]
    if lost:
        raise DataError(f"{folder}: links that lead nowhere: {few(sorted(lost))}; mend or remove them")
    classes = sorted(entry.name for entry in inside if is_folder(entry))
    if not classes:
        raise DataError(f"{folder}: holds no class folders; {_LAYOUT}")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = files_below(folder / name, IMAGE_ENDINGS)
        if not found:
            raise DataError(
                f"{folder / name}: class folder without images; expected files ending in {', '.join(IMAGE_ENDINGS)}"
            )
        paths += found
        labels += [label] * len(found)
    return classes, FileList(tuple(paths), torch.tensor(labels, dtype=torch.int64))


def no_split(folder: Path, layout: str) -> DataError:
    """The error of a data set without its folder ``train`` or ``test``."""
    hint = ""
    if folder.name == "test" and (folder.parent / "val").is_dir():
        hint = f" ({folder.parent / 'val'} exists: rename or link it to 'test')"
    return DataError(f"{folder}: no such folder; {layout}{hint}")


def few(names: Sequence[str]) -> str:
    """The first names of a list, for a message."""
    shown = ", ".join(names[:5]) or "none"
    return f"{shown}, ... ({len(names)})" if len(names) > 5 else shown


def image_size(path: str) -> tuple[int, int]:
    """Height and width from the file's header; DataError if it is not an image."""
    with opened(path) as image:
        return image.height, image.width


def sampled_sizes(paths: Sequence[str], count: int = 64) -> set[tuple[int, int]]:
    """The sizes of about ``count`` images spread evenly over ``paths``, so that not all must be opened."""
    step = max(1, len(paths) // count)
    return {image_size(path) for path in paths[::step]}


class _Chunks(Dataset):
    """Item i is the i-th run of files, decoded, or with only the headers checked if ``size`` is None."""

    def __init__(self, paths: Sequence[str], size: tuple[int, int] | None):
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return -(-len(self.paths) // _CHUNK)

    def __getitem__(self, index: int) -> tuple[Tensor, str, str]:
        """Images (n, 3, H, W) uint8, then message and kind ("", "unreadable", "size") of the first error.

        Errors travel as text: an exception raised in a worker would reach the user wrapped in its traceback.
        """
        paths = self.paths[index * _CHUNK : (index + 1) * _CHUNK]
        images = torch.empty((len(paths), 3, *self.size) if self.size else 0, dtype=torch.uint8)
        for i, path in enumerate(paths):
            try:
                if self.size is None:
                    image_size(path)
                    continue
                pixels = read_image(path)
            except DataError as error:
                return images, str(error), "unreadable"
            if pixels.shape[1:] != images.shape[2:]:
                return images, path, "size"
            images[i] = pixels
        return images, "", ""


def read_image(path: str) -> Tensor:
    """One file as an RGB tensor (3, H, W) uint8; DataError if it cannot be read."""
    with opened(path) as image:
        return rgb(image)


class MixedSizes(Exception):
    """An image's size differs from the others'; the argument is its path."""


def decode(files: FileList, size: tuple[int, int], *, workers: int, progress: bool, label: str) -> Tensor:
    """All images as one tensor (N, 3, H, W) uint8, decoded by ``workers`` processes (0: in this one).

    Raises DataError for an unreadable image and MixedSizes for one that is not of ``size``.
    """
    images = torch.empty((len(files.paths), 3, *size), dtype=torch.uint8)
    done = 0
    for part in run_chunks(_Chunks(files.paths, size), _CHUNK, len(files.paths), workers, progress, label):
        images[done : done + len(part)] = part
        done += len(part)
    return images


def check_headers(files: FileList, *, workers: int, progress: bool, label: str) -> None:
    """Read every file's header, so that a file which is no image is found before any training."""
    for _ in run_chunks(_Chunks(files.paths, None), _CHUNK, len(files.paths), workers, progress, label):
        pass


def run_chunks(
    chunks: Dataset[tuple[Tensor, str, str]], chunk: int, images: int, workers: int, progress: bool, label: str
) -> Iterator[Tensor]:
    """The tensors of ``chunks``, each of ``chunk`` of the ``images`` files, made by ``workers`` processes.

    A chunk is a tensor, then message and kind of the first error in it, as ``_Chunks`` has them.
    """
    loader = DataLoader(
        chunks,
        batch_size=None,
        # Starting processes costs more than decoding a few hundred images.
        num_workers=workers if images > 8 * chunk else 0,
        worker_init_fn=ignore_interrupts,
        generator=torch.Generator(),
    )
    with progress_bar(total=images, description=label, unit="image", show=progress) as bar:
        for index, (part, message, kind) in enumerate(loader):
            if kind == "size":
                raise MixedSizes(message)
            if kind:
                raise DataError(message)
            yield part
            bar.update(min(chunk, images - index * chunk))

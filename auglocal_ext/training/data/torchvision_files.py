"""CIFAR-10, SVHN and STL-10 as torchvision stores them, checked file by file and read into uint8 tensors."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import DataError

# What tells a format: a file or folder its data set keeps below the root, and the archive it comes out of.
MARKS = {
    "cifar10": ("cifar-10-batches-py", "cifar-10-python.tar.gz"),
    "svhn": ("train_32x32.mat", None),
    "stl10": ("stl10_binary", "stl10_binary.tar.gz"),
}


def import_torchvision() -> ModuleType:
    """torchvision, or a DataError that says how to get it and why it did not import."""
    try:
        import torchvision
        import torchvision.datasets
    except Exception as error:  # a torchvision built for another torch fails with RuntimeError or OSError
        version = torch.__version__.split("+")[0]
        raise DataError(
            f"this data needs torchvision, which did not import ({type(error).__name__}: {error}); "
            f"install the one that belongs to your torch: pip install torchvision torch=={version}"
        ) from error
    return torchvision


def read_cifar10(root: Path) -> tuple[list[str], Tensor, Tensor, Tensor, Tensor]:
    """Class names, then images (N, 3, 32, 32) uint8 and labels int64 of the train and the test split."""
    kind = import_torchvision().datasets.CIFAR10
    folder = root / kind.base_folder
    wanted = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
    _check_files("CIFAR-10", folder, wanted)
    train, test = kind(root, train=True), kind(root, train=False)
    parts = [part for split in (train, test) for part in (_from_hwc(split.data), torch.tensor(split.targets))]
    return list(train.classes), parts[0], parts[1], parts[2], parts[3]


def read_svhn(root: Path) -> tuple[list[str], Tensor, Tensor, Tensor, Tensor]:
    """As ``read_cifar10``, for SVHN's ``train`` (without ``extra``) and ``test`` split; needs scipy."""
    kind = import_torchvision().datasets.SVHN
    _check_files("SVHN", root, [kind.split_list[split][1:] for split in ("train", "test")])
    try:
        import scipy.io  # noqa: F401
    except ImportError as error:
        raise DataError(
            f"SVHN's .mat files are read with scipy, which is missing ({error}): pip install scipy"
        ) from error
    train, test = kind(root, split="train"), kind(root, split="test")
    parts = [torch.from_numpy(array) for split in (train, test) for array in (split.data, split.labels)]
    return [str(digit) for digit in range(10)], parts[0], parts[1], parts[2], parts[3]


def read_stl10(root: Path) -> tuple[list[str], Tensor, Tensor, Tensor, Tensor]:
    """As ``read_cifar10``, for STL-10's labelled images, (N, 3, 96, 96); ten classes.

    AugLocal's released code trains STL-10 with 100 outputs because of a misspelt name; here it has its ten.
    """
    original: Any = import_torchvision().datasets.STL10

    class Labelled(original):  # the 2.6 GB of unlabelled images are neither needed nor asked for
        train_list = original.train_list[:2]

    _check_files("STL-10", root / original.base_folder, [*Labelled.train_list, *Labelled.test_list])
    train, test = Labelled(root, split="train"), Labelled(root, split="test")
    parts = [
        torch.tensor(array, dtype=dtype)
        for split in (train, test)
        for array, dtype in ((split.data, torch.uint8), (split.labels, torch.int64))
    ]
    return [str(name) for name in train.classes], parts[0], parts[1], parts[2], parts[3]


READERS = {"cifar10": read_cifar10, "svhn": read_svhn, "stl10": read_stl10}


def _from_hwc(images: Any) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


def _check_files(name: str, folder: Path, wanted: list[Any]) -> None:
    """torchvision says only "not found or corrupted"; this names the file, and tells missing from damaged."""
    from torchvision.datasets.utils import calculate_md5

    for file, checksum in wanted:
        path = folder / file
        if not path.is_file():
            raise DataError(f"{path}: no such file; {name} in torchvision's layout has it there")
        found = calculate_md5(str(path))
        if found != checksum:
            raise DataError(
                f"{path}: not the file of {name} ({path.stat().st_size} bytes, md5 {found}, "
                f"expected {checksum}); unpack the data set's archive again"
            )

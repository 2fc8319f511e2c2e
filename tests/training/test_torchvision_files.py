"""Data sets in torchvision's own layout, with its checksums replaced by those of tiny stand-ins."""

from __future__ import annotations

import hashlib
import pickle

import numpy as np
import pytest
import torch

from auglocal_ext.training import DataError, SettingsError, load_data
from auglocal_ext.training.data import torchvision_files

try:
    from torchvision import datasets
except Exception as error:
    pytest.skip(f"torchvision does not import here: {error}", allow_module_level=True)


def load(root, **options):
    return load_data(root, workers=0, progress=False, **options)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def cifar10(tmp_path, monkeypatch):
    """Five batches of four images and a test batch, and CIFAR10 told their checksums."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    pixels = {name: generator.integers(0, 256, (4, 3072), dtype=np.uint8) for name in names}
    for i, name in enumerate(names):
        with (folder / name).open("wb") as file:
            pickle.dump({"data": pixels[name], "labels": [i, 9, 1, 0]}, file)
    with (folder / "batches.meta").open("wb") as file:
        pickle.dump({"label_names": [f"class{i}" for i in range(10)]}, file)
    entries = [[name, md5(folder / name)] for name in names]
    monkeypatch.setattr(datasets.CIFAR10, "train_list", entries[:5])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", entries[5:])
    meta = {"filename": "batches.meta", "key": "label_names", "md5": md5(folder / "batches.meta")}
    monkeypatch.setattr(datasets.CIFAR10, "meta", meta)
    return tmp_path, pixels


def test_cifar10(cifar10):
    root, pixels = cifar10
    arrays = load(root)
    assert arrays.name == "cifar10" and len(arrays.classes) == 10 and arrays.input_shape == (3, 32, 32)
    assert arrays.train_labels.tolist() == [x for i in range(5) for x in (i, 9, 1, 0)]
    expected = torch.from_numpy(pixels["data_batch_2"][1]).view(3, 32, 32)
    assert torch.equal(arrays.train_images[5], expected) and arrays.train_images.is_contiguous()
    assert torch.equal(arrays.test_images[3], torch.from_numpy(pixels["test_batch"][3]).view(3, 32, 32))


def test_cifar10_part(cifar10):
    assert load(cifar10[0], train_images=7).train_images.shape == (7, 3, 32, 32)


def test_cifar10_file_missing(cifar10):
    path = cifar10[0] / "cifar-10-batches-py" / "data_batch_3"
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: no such file; CIFAR-10"):
        load(cifar10[0])


def test_cifar10_file_damaged(cifar10):
    """Before anything is unpickled."""
    path = cifar10[0] / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{path}: not the file of CIFAR-10 .* unpack"):
        load(cifar10[0])


def test_cifar10_is_not_resized(cifar10):
    with pytest.raises(SettingsError, match="--image-size 64"):
        load(cifar10[0], image_size=64)


def test_the_true_checksums_are_torchvision_s(tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"no batch")
    with pytest.raises(DataError, match="expected c99cafc152244af753f735de768cd75f"):
        load(tmp_path)


@pytest.fixture
def stl10(tmp_path, monkeypatch):
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (3, 3, 96, 96), dtype=np.uint8)
    pixels.tofile(folder / "train_X.bin")
    pixels[:2].tofile(folder / "test_X.bin")
    np.array([1, 10, 4], dtype=np.uint8).tofile(folder / "train_y.bin")
    np.array([2, 3], dtype=np.uint8).tofile(folder / "test_y.bin")
    (folder / "class_names.txt").write_text("\n".join(f"thing{i}" for i in range(10)))
    for split in ("train", "test"):
        entries = [[f"{split}_{k}.bin", md5(folder / f"{split}_{k}.bin")] for k in "Xy"]
        if split == "train":
            entries.append(["unlabeled_X.bin", "not looked at"])
        monkeypatch.setattr(datasets.STL10, f"{split}_list", entries)
    return tmp_path, pixels


def test_stl10_has_ten_classes_and_needs_no_unlabelled_images(stl10):
    root, pixels = stl10
    arrays = load(root)
    assert arrays.name == "stl10" and len(arrays.classes) == 10 and arrays.input_shape == (3, 96, 96)
    assert arrays.train_labels.tolist() == [0, 9, 3] and arrays.test_labels.tolist() == [1, 2]
    # The files hold each channel column by column.
    assert torch.equal(arrays.train_images[2], torch.from_numpy(pixels[2]).transpose(1, 2))


def test_stl10_file_missing(stl10):
    path = stl10[0] / "stl10_binary" / "test_y.bin"
    path.unlink()
    with pytest.raises(DataError, match=f"{path}: no such file; STL-10"):
        load(stl10[0])


@pytest.fixture
def svhn(tmp_path, monkeypatch):
    io = pytest.importorskip("scipy.io")
    pixels = np.random.default_rng(2).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    lists = {}
    for split, labels in (("train", [1, 10, 9, 2]), ("test", [3, 10, 1, 1])):
        path = tmp_path / f"{split}_32x32.mat"
        io.savemat(path, {"X": pixels, "y": np.array(labels, dtype=np.uint8)[:, None]})
        lists[split] = ["", path.name, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", lists)
    return tmp_path, pixels


def test_svhn_digit_zero_is_class_zero(svhn):
    root, pixels = svhn
    arrays = load(root)
    assert arrays.name == "svhn" and arrays.train_labels.tolist() == [1, 0, 9, 2]
    assert torch.equal(arrays.train_images[1], torch.from_numpy(pixels[..., 1]).permute(2, 0, 1))


def test_svhn_test_file_missing(tmp_path):
    (tmp_path / "train_32x32.mat").write_bytes(b"")
    with pytest.raises(DataError, match="train_32x32.mat: not the file of SVHN"):
        load(tmp_path)


def test_a_torchvision_that_does_not_import_is_named(tmp_path, monkeypatch):
    (tmp_path / "stl10_binary").mkdir()
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(DataError, match=r"needs torchvision, .*halted.*pip install torchvision torch==\d[\d.]+\w*$"):
        load(tmp_path)
    assert torchvision_files.MARKS.keys() == torchvision_files.READERS.keys()

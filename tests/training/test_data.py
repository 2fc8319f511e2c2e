"""What is found in a folder, what is refused, and what is said about it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from auglocal_ext.training import DataError, ImageArrays, ImageFiles, SettingsError, load_data
from auglocal_ext.training.data import datasets as data
from auglocal_ext.training.data import folder


def load(root, **options):
    return load_data(root, workers=0, progress=False, **options)


def test_equal_images_are_decoded_into_memory(image_folder):
    root = image_folder(classes=("b", "a", "c"), train=4, test=2, size=(10, 14))
    arrays = load(root)
    assert isinstance(arrays, ImageArrays)
    assert arrays.classes == ("a", "b", "c") and arrays.input_shape == (3, 10, 14)
    assert arrays.train_labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and arrays.test_count == 6
    with Image.open(root / "train" / "b" / "002.png") as image:
        expected = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(arrays.train_images[6], expected)


def test_lists_the_same_images_as_torchvision(image_folder, write_image):
    try:
        from torchvision.datasets import ImageFolder
    except Exception as error:
        pytest.skip(f"torchvision: {error}")
    root = image_folder(classes=("x", "B", "a"))
    write_image(root / "train" / "a" / "deeper" / "1.png", (12, 12), 7)
    (root / "train" / "a" / "notes.txt").write_text("no image")
    theirs = ImageFolder(root / "train")
    classes, ours, _ = folder.list_folder(root)
    assert classes == theirs.classes
    assert list(zip(ours.paths, ours.labels.tolist(), strict=True)) == theirs.samples


def test_worker_processes_decode_the_same(image_folder, monkeypatch):
    monkeypatch.setattr(folder, "_CHUNK", 2)  # 12 images are then enough to start workers for
    root = image_folder(train=10, test=9)
    inline = load_data(root, workers=0, progress=False)
    parallel = load_data(root, workers=2, progress=False)
    assert torch.equal(inline.train_images, parallel.train_images)
    assert torch.equal(inline.test_images, parallel.test_images)


def test_grey_and_transparent_images_become_rgb(image_folder):
    root = image_folder()
    Image.new("L", (12, 12), 77).save(root / "train" / "cat" / "000.png")
    Image.new("RGBA", (12, 12), (1, 2, 3, 4)).save(root / "train" / "cat" / "001.png")
    images = load(root).train_images
    assert images[0].unique().tolist() == [77]
    assert images[1, :, 0, 0].tolist() == [1, 2, 3]


def test_mixed_sizes_stay_files(image_folder, write_image):
    root = image_folder()
    write_image(root / "test" / "dog" / "000.png", (20, 8), 1)
    files = load(root, streamed_size=24)
    assert isinstance(files, ImageFiles) and files.input_shape == (3, 24, 24)
    assert files.train_count == 12 and len(files.train.labels) == 12


def test_a_mixed_size_the_sample_missed_is_found_when_decoding(image_folder, write_image, monkeypatch):
    root = image_folder()
    write_image(root / "train" / "dog" / "003.png", (20, 8), 1)
    monkeypatch.setattr(data, "sampled_sizes", lambda paths: {(12, 12)})
    assert isinstance(load(root), ImageFiles)


def test_images_beyond_the_budget_stay_files(image_folder, monkeypatch):
    root = image_folder(train=6, test=3)
    monkeypatch.setattr(data, "RESIDENT_BYTES", 18 * 3 * 144)
    assert isinstance(load(root), ImageArrays)
    monkeypatch.setattr(data, "RESIDENT_BYTES", 18 * 3 * 144 - 1)
    assert isinstance(load(root), ImageFiles)


def test_another_image_size_means_resizing(image_folder):
    root = image_folder()
    assert isinstance(load(root, image_size=12), ImageArrays)
    files = load(root, image_size=16)
    assert isinstance(files, ImageFiles) and files.image_size == 16


def test_part_of_the_training_images(image_folder):
    root = image_folder(train=30)
    whole, part, again = load(root), load(root, train_images=20), load(root, train_images=20)
    assert part.train_count == 20 and part.test_count == whole.test_count
    assert torch.equal(part.train_images, again.train_images)
    assert part.train_labels.unique().tolist() == [0, 1]  # not the first 20, which are all of one class
    with pytest.raises(SettingsError, match="between 2 and the 60 there are"):
        load(root, train_images=61)


def refuse(root, *parts, **options):
    with pytest.raises(DataError) as caught:
        load(root, **options)
    for part in (str(root), *parts):
        assert part in str(caught.value), caught.value


def test_no_such_folder(tmp_path):
    refuse(tmp_path / "nowhere", "no such folder", "expected train/<class>/<image>")
    refuse(tmp_path / "nowhere", "no such folder", dataset="folder")
    (tmp_path / "text.txt").write_text("to be")
    refuse(tmp_path / "text.txt", "a file, where a folder of images is expected", dataset="folder")


def test_nothing_recognised(tmp_path):
    (tmp_path / "readme.md").write_text("hello")
    refuse(tmp_path, "no data set recognised", "train/<class>/<image>", "cifar-10-batches-py", "readme.md")


def test_archive_not_unpacked(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"")
    (tmp_path / "readme.txt").write_text("which is no text to train on")
    refuse(tmp_path, f"unpack {tmp_path / 'cifar-10-python.tar.gz'}")


def test_inner_folder_given(tmp_path):
    inner = tmp_path / "cifar-10-batches-py"
    inner.mkdir()
    refuse(inner, f"give its parent folder {tmp_path}")


def test_two_data_sets(image_folder):
    root = image_folder()
    (root / "train_32x32.mat").write_bytes(b"")
    refuse(root, "more than one data set (folder, svhn)", "--dataset")
    assert load(root, dataset="folder").name == "folder"


@pytest.mark.parametrize("split", ["train", "test"])
def test_missing_split(image_folder, split):
    root = image_folder()
    shutil.rmtree(root / split)
    refuse(root, f"{root / split}: no such folder", "expected train/<class>/<image>")


def test_val_instead_of_test(image_folder):
    root = image_folder()
    (root / "test").rename(root / "val")
    refuse(root, "rename or link it to 'test'")


def test_no_class_folders(image_folder):
    root = image_folder()
    shutil.rmtree(root / "test")
    (root / "test").mkdir()
    refuse(root, f"{root / 'test'}: holds no class folders")


def test_empty_class(image_folder):
    root = image_folder()
    for file in (root / "train" / "dog").iterdir():
        file.rename(file.with_suffix(".txt"))
    refuse(root, f"{root / 'train' / 'dog'}: class folder without images", ".jpg")


def test_different_classes(image_folder):
    root = image_folder()
    (root / "test" / "dog").rename(root / "test" / "fox")
    refuse(root, "only in train/: dog; only in test/: fox")


def test_one_class(image_folder):
    refuse(image_folder(classes=("only",)), "at least two class folders", "only")


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("content", [b"", b"this is text, not a picture"])
def test_unreadable_image(image_folder, write_image, content, mixed):
    root = image_folder(train=70)
    if mixed:
        write_image(root / "train" / "cat" / "000.png", (20, 20), 1)
    bad = root / "train" / "dog" / "030.png"
    bad.write_bytes(content)
    refuse(root, f"{bad}: unreadable image", f"{len(content)} bytes")


def test_truncated_image(image_folder):
    root = image_folder(train=70, size=(32, 32))
    bad = root / "train" / "cat" / "033.png"
    bad.write_bytes(bad.read_bytes()[:-900])
    refuse(root, f"{bad}: unreadable image")


def test_unknown_kind(image_folder):
    with pytest.raises(SettingsError, match="--dataset is one of auto, folder"):
        load(image_folder(), dataset="mnist")

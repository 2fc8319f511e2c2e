"""Odd files in image folders: other formats, more than 8 bits, links that lead back, pipes."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image, features

from auglocal_ext.training import DataError, load_data
from auglocal_ext.training.data.folder import image_size, list_folder, read_image


def test_a_format_that_starts_programs_is_not_opened(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(path, "EPS")
    with Image.open(path) as image:  # by its content, whatever its name
        assert image.format == "EPS"
    for read in (image_size, read_image):
        with pytest.raises(DataError, match=r"x.png: unreadable .*cannot identify image file; expected JPEG, PNG"):
            read(str(path))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF"])
def test_formats_that_are_read(tmp_path, kind):
    if kind == "WEBP" and not features.check("webp"):
        pytest.skip("Pillow has no WebP")
    path = tmp_path / "x.jpg"  # the name does not say what it is
    Image.new("RGB", (8, 6), (255, 255, 255)).save(path, kind)
    assert image_size(str(path)) == (6, 8)
    found = read_image(str(path))
    assert found.shape == (3, 6, 8) and found.dtype == torch.uint8 and int(found.min()) > 250


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bits_are_decoded_by_their_range(tmp_path, ending):
    values = np.array([[0, 128, 129, 257], [32768, 65535, 65407, 1000]], dtype=np.uint16)
    path = str(tmp_path / f"x.{ending}")
    Image.fromarray(values).save(path)
    found = read_image(path)
    assert found.tolist() == [[[0, 0, 1, 1], [128, 255, 255, 4]]] * 3


@pytest.mark.parametrize("values", [np.float32([[0.0, 0.5], [1.0, 300.0]]), np.int32([[0, 70_000], [-1, 5]])])
def test_values_without_a_known_range_are_refused(tmp_path, values):
    path = str(tmp_path / "x.tif")
    Image.fromarray(values).save(path)
    for read in (image_size, read_image):
        with pytest.raises(DataError, match=r"x.tif: unreadable image \(values of mode [FI] have no known range"):
            read(path)


def test_a_link_to_a_folder_around_it_is_refused(image_folder):
    root = image_folder()
    (root / "train" / "cat" / "again").symlink_to(root / "train" / "cat")
    with pytest.raises(DataError, match="cat/again: a link to a folder that contains it; remove the link"):
        list_folder(root)
    (root / "train" / "cat" / "again").unlink()
    for name in ("a", "b"):  # two of them double the paths with every level
        (root / "train" / "dog" / name).symlink_to(root / "train")
    with pytest.raises(DataError, match="a link to a folder that contains it"):
        list_folder(root)


def test_links_that_lead_elsewhere_are_followed_in_torchvisions_order(image_folder, tmp_path, write_image):
    from torchvision.datasets import ImageFolder

    root = image_folder()
    write_image(tmp_path / "elsewhere" / "deep" / "z.png", (12, 12), 1)
    (root / "train" / "cat" / "0linked").symlink_to(tmp_path / "elsewhere")
    (root / "train" / "cat" / "zlinked").symlink_to(tmp_path / "elsewhere")  # twice, as torchvision has it
    _, train, _ = list_folder(root)
    expected = ImageFolder(str(root / "train")).samples
    assert list(zip(train.paths, train.labels.tolist(), strict=True)) == expected
    assert len(expected) == 14


def test_a_pipe_is_refused_and_not_waited_for(image_folder):
    root = image_folder()
    os.mkfifo(root / "train" / "cat" / "pipe.png")
    with pytest.raises(DataError, match=r"pipe.png: unreadable image \(not a regular file"):
        load_data(root, workers=0, progress=False)
    (root / "train" / "cat" / "pipe.png").unlink()
    (root / "train" / "cat" / "link.png").symlink_to("nowhere.png")
    with pytest.raises(DataError, match=r"link.png: unreadable image \(No such file"):
        load_data(root, workers=0, progress=False)


def test_links_that_lead_nowhere(image_folder):
    root = image_folder()
    cat = root / "train" / "cat"
    (cat / "notes").symlink_to("notes")  # no image
    assert load_data(root, workers=0, progress=False).train_count == 12
    (cat / "a.png").symlink_to("a.png")
    with pytest.raises(DataError, match=r"cat/a.png: unreadable image \(Too many levels of symbolic links"):
        load_data(root, workers=0, progress=False)
    (cat / "a.png").unlink()
    for target in ("bird", "nowhere"):
        (root / "train" / "bird").symlink_to(target)
        with pytest.raises(DataError, match="train: links that lead nowhere: bird; mend or remove them"):
            load_data(root, workers=0, progress=False)
        (root / "train" / "bird").unlink()


def test_a_path_that_the_system_does_not_take_is_one_line(image_folder, tmp_path, monkeypatch):
    for dataset in ("auto", "folder", "masks"):
        with pytest.raises(DataError, match="a cannot be read: File name too long"):
            load_data(tmp_path / ("a" * 300), dataset)
    root, plain = image_folder(), os.stat

    def closed(path, *arguments, **options):
        if os.fspath(path).endswith("dog/002.png"):
            raise PermissionError(13, "Permission denied")
        return plain(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", closed)
    with pytest.raises(DataError, match=r"dog/002.png: unreadable image \(Permission denied"):
        load_data(root, workers=0, progress=False)


def test_a_folder_that_cannot_be_read_is_named(image_folder, monkeypatch):
    root, plain = image_folder(), os.scandir

    def closed(path):
        if os.fspath(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return plain(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match="train/dog cannot be read: Permission denied"):
        list_folder(root)

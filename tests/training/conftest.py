"""Small data sets made on the spot."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from auglocal_ext.training import ImageArrays, TrainConfig


def write_image(path: Path, size: tuple[int, int], seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(autouse=True)
def pictures_are_files(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning curves take a third of a second to draw: an empty file stands for them, but in test_run_picture.py."""
    if request.path.name != "test_run_picture.py":
        monkeypatch.setattr("auglocal_ext.training.run.trainer.draw_run", lambda path, *_: path.touch())


@pytest.fixture(name="write_image")
def write_image_fixture() -> Callable[[Path, tuple[int, int], int], None]:
    return write_image


def make_images(
    root: Path,
    classes: tuple[str, ...] = ("cat", "dog"),
    train: int = 6,
    test: int = 3,
    size: tuple[int, int] = (12, 12),
) -> Path:
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            for i in range(count):
                seed = 1000 * label + i + (500 if split == "test" else 0)
                write_image(root / split / name / f"{i:03}.png", size, seed)
    return root


@pytest.fixture
def image_folder(tmp_path: Path) -> Callable[..., Path]:
    return partial(make_images, tmp_path / "images")


@pytest.fixture(scope="session", name="make_images")
def make_images_fixture() -> Callable[..., Path]:
    return make_images


@pytest.fixture
def separable() -> ImageArrays:
    """Three classes told by their colour: 30 training and 12 test images of 16 x 16."""
    generator = torch.Generator().manual_seed(5)

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 3
        images = torch.randint(0, 120, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
        images[torch.arange(count), labels] += 120
        return images, labels

    return ImageArrays("folder", ("red", "green", "blue"), *split(30), *split(12))


@pytest.fixture
def config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Settings of a run of seconds; keyword arguments replace them."""

    def make(**settings: object) -> TrainConfig:
        defaults = {
            "data": "unused",
            "output": str(tmp_path / "run"),
            "network": "resnet8",
            "width": 4,
            "rule": "bp",
            "epochs": 4,
            "batch_size": 8,
            "lr": 0.05,
            "device": "cpu",
            "workers": 0,
        }
        return TrainConfig(**{**defaults, **settings})

    return make

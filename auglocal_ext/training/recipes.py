"""The training recipes of AugLocal's experiments, one per data set (Ma et al., ICLR 2024; released code)."""

from __future__ import annotations

from dataclasses import dataclass

from .augment import Augmentation


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum, a cosine schedule stepped per epoch, and the images' augmentation.

    Weight decay acts on every parameter, BatchNorm's and biases included, as in the released code.
    """

    epochs: int
    batch_size: int
    lr: float
    warmup: int
    augmentation: Augmentation
    weight_decay: float = 1e-4
    momentum: float = 0.9


_HALF = (127.5, 127.5, 127.5)

RECIPES: dict[str, Recipe] = {
    "cifar10": Recipe(
        epochs=400,
        batch_size=1024,
        lr=0.8,
        warmup=10,
        augmentation=Augmentation(
            padding=4, padding_mode="reflect", flip=True, mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7)
        ),
    ),
    "svhn": Recipe(
        epochs=400,
        batch_size=1024,
        lr=0.8,
        warmup=10,
        augmentation=Augmentation(padding=2, padding_mode="zero", flip=False, mean=_HALF, std=_HALF),
    ),
    "stl10": Recipe(
        epochs=400,
        batch_size=128,
        lr=0.1,
        warmup=10,
        augmentation=Augmentation(padding=4, padding_mode="zero", flip=True, mean=_HALF, std=_HALF),
    ),
    # Crop and flip of these images happen while they are read (stream.py), at their own size.
    "imagenet": Recipe(
        epochs=200,
        batch_size=1024,
        lr=0.4,
        warmup=0,
        augmentation=Augmentation(
            padding=0,
            padding_mode="zero",
            flip=False,
            mean=(123.675, 116.28, 103.53),
            std=(58.395, 57.12, 57.375),
        ),
    ),
}

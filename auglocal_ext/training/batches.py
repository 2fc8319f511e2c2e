"""Batches of images in memory, drawn and augmented on the device; and what all sources of batches share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from .augment import Augmentation, channel_constants, crop_and_flip, draw, normalise
from .data import ImageArrays, ImageFiles
from .errors import SettingsError
from .order import epoch_order, mixed_seed, steps_per_epoch
from .stream import StreamedBatches


class Batches(Protocol):
    """Normalised images (B, 3, H, W) fp32 and labels (B,) int64 on the device."""

    steps: int

    def train(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches ``first`` .. ``steps - 1`` of an epoch, the same ones for the same state."""

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images, in order."""

    def state_dict(self) -> dict[str, Tensor]:
        """What ``train`` depends on besides its arguments."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


def make_batches(
    data: ImageArrays | ImageFiles,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    channels_last: bool = False,
    workers: int = 0,
) -> Batches:
    """The source that goes with ``data``; SettingsError if it cannot make batches of two, or pad them."""
    if batch_size < 2 or data.train_count < 2:
        raise SettingsError(
            f"BatchNorm needs batches of two or more: batch size {batch_size}, {data.train_count} images"
        )
    height, width = data.input_shape[1:]
    if augmentation.padding_mode == "reflect" and augmentation.padding >= min(height, width):
        raise SettingsError(
            f"the recipe pads by {augmentation.padding} reflected pixels, too many for images of {height} x {width}; "
            "choose another --recipe"
        )
    if isinstance(data, ImageFiles):
        return StreamedBatches(
            data,
            augmentation,
            batch_size=batch_size,
            seed=seed,
            device=device,
            channels_last=channels_last,
            workers=workers,
        )
    return ResidentBatches(
        data, augmentation, batch_size=batch_size, seed=seed, device=device, channels_last=channels_last
    )


class ResidentBatches:
    """Images kept on the device as uint8; crop and flip of a batch are one gather."""

    def __init__(
        self,
        data: ImageArrays,
        augmentation: Augmentation,
        *,
        batch_size: int,
        seed: int,
        device: torch.device,
        channels_last: bool = False,
    ):
        self.steps = steps_per_epoch(data.train_count, batch_size)
        self._augmentation = augmentation
        self._batch_size, self._seed, self._channels_last = batch_size, seed, channels_last
        self._train = (data.train_images.to(device), data.train_labels.to(device))
        self._test = (data.test_images.to(device), data.test_labels.to(device))
        self._mean, self._std = channel_constants(augmentation, device)
        self._generator = torch.Generator(device).manual_seed(mixed_seed(seed, 0))

    def train(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self._train
        order = epoch_order(len(labels), self._seed, epoch).to(images.device)
        for step in range(first, self.steps):
            picked = order[step * self._batch_size : (step + 1) * self._batch_size]
            yield self._augmented(images, picked), labels[picked]

    def _augmented(self, images: Tensor, picked: Tensor) -> Tensor:
        choice = draw(len(picked), self._augmentation, self._generator)
        return self._normalise(crop_and_flip(images, picked, choice, self._augmentation))

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self._test
        for start in range(0, len(labels), self._batch_size):
            end = start + self._batch_size
            yield self._normalise(images[start:end]), labels[start:end]

    def _normalise(self, batch: Tensor) -> Tensor:
        return normalise(batch, self._mean, self._std, channels_last=self._channels_last)

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._generator.set_state(state["generator"])

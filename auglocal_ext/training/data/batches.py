"""Batches of images in memory, drawn and augmented on the device; and what all sources of batches share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..errors import SettingsError
from .augment import Augmentation, Draw, channel_constants, crop_and_flip, draw, normalise
from .datasets import ImageArrays, Images, MaskFiles
from .order import WHOLE, Part, epoch_order, mixed_seed, steps_per_epoch
from .stream import StreamedBatches


class Batches(Protocol):
    """Normalised images (B, 3, H, W) fp32 and labels (B,), or masks (B, H, W), int64 on the device."""

    steps: int

    def train(self, epoch: int, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches ``first`` .. ``steps - 1`` of an epoch, the same ones for the same state."""

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All test images, in order."""

    def state_dict(self) -> dict[str, Tensor]:
        """What ``train`` depends on besides its arguments."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


def make_batches(
    data: Images,
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    device: torch.device,
    channels_last: bool = False,
    workers: int = 0,
    part: Part = WHOLE,
) -> Batches:
    """The source that goes with ``data``, of a replica's part of each batch.

    Every image is cropped and flipped as it is without replicas. SettingsError if there are no batches of two, or they
    cannot be padded or parted.
    """
    replicas = "" if part.count == 1 else f", {part.count} replicas"
    if batch_size % part.count:
        raise SettingsError(
            f"--batch-size {batch_size} is that of all replicas together, and {part.count} replicas cannot have equal "
            f"parts of it: choose a multiple of {part.count}"
        )
    if min(batch_size, data.train_count) // part.count < 2:
        raise SettingsError(
            f"BatchNorm needs batches of two or more: batch size {batch_size}, {data.train_count} images{replicas}"
        )
    if data.test_count < part.count:
        raise SettingsError(f"{data.test_count} test images are too few for {part.count} replicas")
    height, width = data.input_shape[1:]
    if augmentation.padding_mode == "reflect" and augmentation.padding >= min(height, width):
        raise SettingsError(
            f"the recipe pads by {augmentation.padding} reflected pixels, too many for images of {height} x {width}; "
            "choose another --recipe"
        )
    if isinstance(data, MaskFiles) and augmentation.padding:
        raise SettingsError(
            f"the recipe pads images by {augmentation.padding} pixels, but images with masks are cropped at random "
            "scales: choose --recipe masks, or one that does not pad"
        )
    if not isinstance(data, ImageArrays):
        return StreamedBatches(
            data,
            augmentation,
            batch_size=batch_size,
            seed=seed,
            device=device,
            channels_last=channels_last,
            workers=workers,
            part=part,
        )
    return ResidentBatches(
        data, augmentation, batch_size=batch_size, seed=seed, device=device, channels_last=channels_last, part=part
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
        part: Part = WHOLE,
    ):
        self.steps = steps_per_epoch(data.train_count, batch_size, part.count)
        self._part = part
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
            places = self._part.train(len(picked))
            # Drawn for the whole batch, so that no number depends on how it is parted.
            choice = draw(len(picked), self._augmentation, self._generator).at(places)
            picked = picked[places]
            yield self._augmented(images, picked, choice), labels[picked]

    def _augmented(self, images: Tensor, picked: Tensor, choice: Draw) -> Tensor:
        return self._normalise(crop_and_flip(images, picked, choice, self._augmentation))

    def test(self) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self._test
        for here in self._part.test(len(labels), self._batch_size):
            yield self._normalise(images[here]), labels[here]

    def _normalise(self, batch: Tensor) -> Tensor:
        return normalise(batch, self._mean, self._std, channels_last=self._channels_last)

    def state_dict(self) -> dict[str, Tensor]:
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._generator.set_state(state["generator"])

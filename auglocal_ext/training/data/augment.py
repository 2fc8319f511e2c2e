"""Random crop, horizontal flip and normalisation of whole batches, on the device the images lie on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Augmentation:
    """Pad by ``padding`` ("reflect" or "zero"), crop to the image's size, mirror with chance 1/2, normalise.

    ``mean`` and ``std`` are per channel, in the units of the stored images (0..255). Padding happens before
    normalisation, so a zero-padded border is a black one.
    """

    padding: int
    padding_mode: str
    flip: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __post_init__(self) -> None:
        if self.padding_mode not in ("reflect", "zero"):
            raise ValueError(f"padding_mode is 'reflect' or 'zero', not {self.padding_mode!r}")
        if self.padding < 0:
            raise ValueError(f"padding must not be negative, got {self.padding}")


@dataclass(frozen=True)
class Draw:
    """A batch's random choices: each crop's upper left corner in the padded image, whether to mirror it."""

    top: Tensor
    left: Tensor
    mirrored: Tensor

    def at(self, places: list[int] | slice) -> Draw:
        """Those of some of the images."""
        return Draw(self.top[places], self.left[places], self.mirrored[places])


def draw(count: int, augmentation: Augmentation, generator: torch.Generator) -> Draw:
    """Independent choices for ``count`` images on the generator's device: (count,) int64, int64, bool."""
    device = generator.device
    span = 2 * augmentation.padding + 1
    top = torch.randint(span, (count,), generator=generator, device=device)
    left = torch.randint(span, (count,), generator=generator, device=device)
    if augmentation.flip:
        mirrored = torch.rand(count, generator=generator, device=device) < 0.5
    else:
        mirrored = torch.zeros(count, dtype=torch.bool, device=device)
    return Draw(top, left, mirrored)


def _reflect(position: Tensor, size: int) -> Tensor:
    """Fold positions outside 0..size-1 back without repeating the edge: -1 -> 1, size -> size - 2."""
    return (size - 1) - ((size - 1) - position.abs()).abs()


def crop_and_flip(images: Tensor, picked: Tensor, choice: Draw, augmentation: Augmentation) -> Tensor:
    """``images[picked]`` padded, cropped and mirrored; one gather, no padded copy.

    Shapes: images (N, C, H, W) of any dtype, picked (B,) int64, result (B, C, H, W) of the same dtype.
    Reflect padding must be smaller than the image's sides.
    """
    height, width = images.shape[-2:]
    if augmentation.padding_mode == "reflect" and augmentation.padding >= min(height, width):
        raise ValueError(
            f"reflect padding by {augmentation.padding} needs images larger than that, got {height} x {width}"
        )
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    columns = torch.where(choice.mirrored[:, None], width - 1 - columns, columns)
    rows = rows + (choice.top[:, None] - augmentation.padding)
    columns = columns + (choice.left[:, None] - augmentation.padding)

    outside = None
    if augmentation.padding_mode == "reflect":
        rows, columns = _reflect(rows, height), _reflect(columns, width)
    elif augmentation.padding:
        row_out = (rows < 0) | (rows >= height)
        column_out = (columns < 0) | (columns >= width)
        outside = row_out[:, None, :, None] | column_out[:, None, None, :]
        rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)

    channels = torch.arange(images.shape[1], device=images.device)
    batch = images[picked[:, None, None, None], channels[:, None, None], rows[:, None, :, None], columns[:, None, None]]
    return batch if outside is None else batch.masked_fill_(outside, 0)


def channel_constants(augmentation: Augmentation, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, (1, C, 1, 1) fp32; made once, because a copy to a GPU waits for it."""
    mean = torch.tensor(augmentation.mean, dtype=torch.float32, device=device).view(1, -1, 1, 1)
    std = torch.tensor(augmentation.std, dtype=torch.float32, device=device).view(1, -1, 1, 1)
    return mean, std


def normalise(images: Tensor, mean: Tensor, std: Tensor, *, channels_last: bool = False) -> Tensor:
    """``(images - mean) / std`` per channel, fp32, from (N, C, H, W) images in 0..255."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    # uint8 images always make a fresh tensor here, so the arithmetic may be done in place.
    return images.to(torch.float32, memory_format=memory_format, copy=True).sub_(mean).div_(std)

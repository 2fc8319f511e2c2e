"""Image and mask together: scaled, cropped, mirrored and padded alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask_file import IGNORED


@dataclass(frozen=True)
class JointCrop:
    """``size`` x ``size`` pixels of an image and of its mask; both keep their proportions.

    At scale 1 the longer side becomes ``size``. Images are resized bilinearly, with antialiasing, masks to the class of
    the nearest pixel. What the image does not cover has the colour ``fill``, and is ignored in the mask.

    Args:
        size: of the result.
        fill: per channel, in the units of the images.
        scales: the scale is drawn uniformly between these; above 1 a part of the image is taken, at a random place.
        flip: mirror with chance 1/2.

    Source: the scales of InfoPro's experiments on Cityscapes (Wang et al., ICLR 2021), those of mmsegmentation.
    """

    size: int
    fill: Sequence[float]
    scales: tuple[float, float] = (1.0, 1.0)
    flip: bool = False

    def __call__(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Image (C, size, size) uint8 and mask (size, size) uint8, from (C, H, W) and (H, W); draws from torch's CPU
        generator.
        """
        low, high = self.scales
        # Pixels of the image that `size` pixels of the result show.
        side = max(mask.shape) / (low + (high - low) * float(torch.rand(())))
        for axis in (-2, -1):
            kept = min(mask.shape[axis], max(1, round(side)))
            start = int(torch.randint(mask.shape[axis] - kept + 1, ()))
            image, mask = image.narrow(axis, start, kept), mask.narrow(axis, start, kept)
        shape = tuple(min(self.size, max(1, round(length * self.size / side))) for length in mask.shape)
        image = F.interpolate(image[None], shape, mode="bilinear", antialias=True)[0]
        mask = F.interpolate(mask[None, None], shape, mode="nearest-exact")[0, 0]
        if self.flip and float(torch.rand(())) < 0.5:
            image, mask = image.flip(-1), mask.flip(-1)
        return self._padded(image, mask)

    def _padded(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = mask.shape
        top, left = (self.size - rows) // 2, (self.size - columns) // 2
        whole = torch.tensor(self.fill).round().to(image.dtype)[:, None, None].repeat(1, self.size, self.size)
        labels = mask.new_full((self.size, self.size), IGNORED)
        whole[:, top : top + rows, left : left + columns] = image
        labels[top : top + rows, left : left + columns] = mask
        return whole, labels

"""A mask out of a PNG file, of which every pixel is the index of a class."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DataError
from .image_file import opened

IGNORED = 255
"""The value of pixels that count nowhere."""

# What Pillow multiplies grey values of fewer than 8 bits by.
_SCALES = {"L;2": 85, "L;4": 17}


def read_mask(path: str) -> Tensor:
    """One mask as a tensor (H, W) uint8 of class indices; DataError if it cannot be read or holds no indices."""
    with opened(path) as file:
        image: Any = file
        if image.format != "PNG":
            raise DataError(f"{path}: the mask is a {image.format} file in spite of its name; masks are PNG files")
        mode = image.mode
        scale = _SCALES.get(str(image.tile[0][3]), 1) if image.tile else 1
        pixels = np.array(image)
    if mode not in ("P", "L", "1"):
        raise DataError(
            f"{path}: the mask is of Pillow's mode {mode}, but the value of a pixel must be its class: save it as "
            "palette (P) or 8-bit grey (L), with class indices for colours"
        )
    return torch.from_numpy(pixels.astype(np.uint8) // scale)

"""``Adapter``: from the features an auxiliary network has to those a copied layer takes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import Features
from ..models.blocks import initialise

#: For one to three axes.
_POOLS: tuple[Any, ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ADAPTIVE_POOLS: tuple[Any, ...] = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_CONVOLUTIONS: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Adapter(nn.Module):
    """``(N, *source.shape) -> (N, *target.shape)``: average pooling, then a 1x1 convolution or a linear layer.

    Each is there only where sizes, or widths, differ. Where the target has more positions than the source, positions
    are repeated. Maps become tokens in row-major order, and tokens become a map of as many positions. A class token
    passes beside the pooling; where only the target has one, it is the mean over the positions, and where only the
    source has one, it is left out.

    Args:
        source: features of the input.
        target: features of the output.

    Raises:
        ValueError: for vectors that should become maps or tokens, for tokens that should become a map of another number
            of positions, and for more than three axes of positions that should be pooled or convolved.
    """

    def __init__(self, source: Features, target: Features) -> None:
        super().__init__()
        self._source, self._target = source, target
        have, wanted = _positions(source), _positions(target)
        self._shape: tuple[int, ...] | None = None
        if wanted and len(have) != len(wanted):
            self._shape = (math.prod(have),) if len(wanted) == 1 else wanted
            if not have or math.prod(self._shape) != math.prod(have):
                raise ValueError(f"{source} cannot be made into {target}")
            have = self._shape
        self.pool = _pool(have, wanted) if wanted else None
        self.project: nn.Module | None = None
        if source.channels != target.channels:
            self.project = _projection(source.channels, target)
            initialise(self.project)

    def forward(self, h: Tensor) -> Tensor:
        if not _positions(self._target):
            h = self._source.pooled(h)
            return h if self.project is None else self.project(h)
        h = self._source.channels_first(h)
        token = h[..., :1] if self._source.layout == "class_token" else None
        if token is not None:
            h = h[..., 1:]
        if self._shape is not None:
            h = h.reshape(*h.shape[:2], *self._shape)
        if self.pool is not None:
            h = self.pool(h)
        if self._target.layout == "class_token":
            h = torch.cat([h.mean(-1, keepdim=True) if token is None else token, h], -1)
        h = self._target.restored(h)
        return h if self.project is None else self.project(h)


def adapter(source: Features, target: Features) -> Adapter | None:
    """The :class:`Adapter` between two features; None where they are alike."""
    same_axes = (source.layout == "channels_first") == (target.layout == "channels_first") or source.is_vector
    return None if same_axes and source.shape == target.shape else Adapter(source, target)


def _positions(features: Features) -> tuple[int, ...]:
    """Sizes of the position axes without a class token."""
    positions = features.positions
    return (positions[0] - 1,) if features.layout == "class_token" and positions else positions


def _projection(channels: int, target: Features) -> nn.Module:
    axes = len(target.positions)
    if not axes or target.layout != "channels_first":
        return nn.Linear(channels, target.channels)
    if axes > 3:
        raise ValueError(f"there is no convolution of {axes} axes that makes {target} of {channels} channels")
    return _CONVOLUTIONS[axes - 1](channels, target.channels, 1)


def _pool(have: tuple[int, ...], wanted: tuple[int, ...]) -> nn.Module | None:
    if have == wanted:
        return None
    if len(wanted) > 3:
        raise ValueError(f"there is no pooling of {len(wanted)} axes from {have} to {wanted} positions")
    if all(a % b == 0 for a, b in zip(have, wanted, strict=True)):  # its backward is deterministic on CUDA
        return _POOLS[len(wanted) - 1](tuple(a // b for a, b in zip(have, wanted, strict=True)))
    return _ADAPTIVE_POOLS[len(wanted) - 1](wanted)

"""``Features``: what a module hands on, described once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor, nn

from ..nn import global_average_pool

#: Where the channels of ``(N, *shape)`` are: on axis 1, as for convolutions and BatchNorm; on the last axis, as for
#: linear layers and LayerNorm; or on the last axis of tokens whose first one is a class token that heads read alone.
Layout = Literal["channels_first", "channels_last", "class_token"]
#: The values of ``Layout``.
LAYOUTS: tuple[str, ...] = get_args(Layout)


@dataclass(frozen=True)
class Features:
    """A tensor ``(N, *shape)``: which axis holds its channels, which axes are positions, and how it is pooled.

    Attributes:
        shape: without the batch: ``(C,)`` for vectors, ``(C, *positions)`` or ``(*positions, C)``.
        layout: which of the last two it is; meaningless for vectors. Pooling is the mean over all positions; for
            ``"class_token"``, ``(T, C)``, it takes the first token.
    """

    shape: tuple[int, ...]
    layout: Layout = "channels_first"

    def __post_init__(self) -> None:
        if self.layout == "class_token" and len(self.shape) not in (1, 2):
            raise ValueError(f"a class token is the first of tokens (T, C), not of features of shape {self.shape}")

    @property
    def channels(self) -> int:
        """C."""
        return self.shape[0] if self.layout == "channels_first" else self.shape[-1]

    @property
    def positions(self) -> tuple[int, ...]:
        """Sizes of the position axes; none of vectors."""
        return self.shape[1:] if self.layout == "channels_first" else self.shape[:-1]

    @property
    def is_vector(self) -> bool:
        return len(self.shape) == 1

    @property
    def is_tokens(self) -> bool:
        """Whether the positions are a sequence with the channels last, ``(T, C)``."""
        return self.layout != "channels_first" and len(self.shape) == 2

    @property
    def is_2d(self) -> bool:
        """Whether the positions have height and width, so that 2-D convolutions apply."""
        return len(self.positions) == 2

    def channels_first(self, x: Tensor) -> Tensor:
        """``x`` ``(N, *shape)`` as ``(N, C, *positions)``, a view of it."""
        return x if self.layout == "channels_first" else x.movedim(-1, 1)

    def restored(self, x: Tensor) -> Tensor:
        """The inverse of :meth:`channels_first`."""
        return x if self.layout == "channels_first" else x.movedim(1, -1)

    def seen(self, x: Tensor) -> Tensor:
        """What a head reads, ``(N, C, *positions)``; for tokens with a class token only that token, ``(N, C)``."""
        return x[:, 0] if self.layout == "class_token" and x.dim() == 3 else self.channels_first(x)

    @property
    def seen_positions(self) -> tuple[int, ...]:
        """Sizes of the position axes of :meth:`seen`."""
        return () if self.layout == "class_token" else self.positions

    def pooled(self, x: Tensor) -> Tensor:
        """``x`` ``(N, *shape)`` as one vector per sample, ``(N, C)``: the mean of :meth:`seen` over its positions."""
        return global_average_pool(self.seen(x))

    def with_channels(self, channels: int) -> Features:
        """The same positions with other channels."""
        positions = self.positions
        shape = (channels, *positions) if self.layout == "channels_first" else (*positions, channels)
        return replace(self, shape=shape)

    def __str__(self) -> str:
        sizes = " x ".join(map(str, self.positions))
        if self.is_vector:
            return f"vectors of {self.channels} features"
        if self.is_tokens:
            token = ", the first of them a class token" if self.layout == "class_token" else ""
            return f"{sizes} tokens of {self.channels} features{token}"
        return f"maps of {self.channels} channels and {sizes} positions" + (
            ", channels last" if self.layout == "channels_last" else ""
        )


def vectors(channels: int) -> Features:
    """Features ``(N, channels)``."""
    return Features((channels,))


def pooled_size(channels: int, positions: tuple[int, ...], limit: int) -> tuple[int, ...]:
    """Sizes of the position axes, the longest halved in turn until their product with C is at most ``limit``, or 1."""
    size = list(positions)
    while channels * math.prod(size) > limit and max(size, default=1) > 1:
        longest = size.index(max(size))
        size[longest] = -(-size[longest] // 2)
    return tuple(size)


def pooling(positions: tuple[int, ...], size: tuple[int, ...]) -> nn.Module | None:
    """Average pooling of ``(N, C, *positions)`` to ``(N, C, *size)``, then flattening; None where torch has none."""
    kinds: dict[int, Any] = {0: None, 1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
    if len(positions) not in kinds:
        return None
    kind = kinds[len(positions)]
    return nn.Identity() if kind is None else nn.Sequential(kind(size), nn.Flatten())


def padded_pooling(positions: tuple[int, ...], size: tuple[int, ...]) -> nn.Module | None:
    """:func:`pooling` with windows of a power of two, over positions padded with zeros that count.

    An axis of s positions is pooled to ceil(s / k) windows of k. Half a window of zeros is at either end where k does
    not divide s.
    """
    kinds: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
    if len(positions) not in kinds:
        return pooling(positions, size)
    windows = tuple(_window(old, new) for old, new in zip(positions, size, strict=True))
    padding = tuple(0 if old % window == 0 else window // 2 for old, window in zip(positions, windows, strict=True))
    return nn.Sequential(kinds[len(positions)](windows, padding=padding), nn.Flatten())


def _window(old: int, new: int) -> int:
    """The smallest power of two of which ``new`` cover ``old`` positions."""
    window = 1
    while -(-old // window) > new:
        window *= 2
    return window

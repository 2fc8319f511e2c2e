"""Context supplied to a local module (ContSup): encoders of the image and of earlier modules' inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ..models.blocks import initialise


def parse_context(context: str) -> tuple[int, bool]:
    """``(n, image)`` of a context structure: ``"R0"`` is (0, False), ``"E"`` (0, True), ``"R4E"`` (4, True).

    Raises:
        ValueError: if the string is not ``R<n>``, ``E`` or ``R<n>E``.
    """
    match = re.fullmatch(r"(?:R(\d+))?(E)?", context) if isinstance(context, str) else None
    if match is None or not context:
        raise ValueError(
            f"unknown context structure {context!r}; expected 'R0' (none), 'E' (image), 'R<n>' (the last n module "
            "inputs) or 'R<n>E' (both), for example 'R1E'"
        )
    return int(match[1] or 0), match[2] is not None


def _match_size(z: Tensor, h: Tensor) -> Tensor:
    if z.shape[-2:] == h.shape[-2:]:
        return z
    return F.adaptive_avg_pool2d(z, (h.shape[-2], h.shape[-1]))


class ImageEncoder(nn.Module):
    """Context "E": two 3x3 convolutions with BatchNorm and ReLU at full resolution, then average pooling.

    ``(N, in_channels, S, S) -> (N, out_channels, *size of h)``, 12 channels in between; 360 + 111 C parameters
    for RGB images.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int = 12) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )
        initialise(self)

    def forward(self, image: Tensor, h: Tensor) -> Tensor:
        return _match_size(self.encoder(image), h)


class InputEncoder(nn.Module):
    """Context "R": a 1x1 convolution with BatchNorm and ReLU at the source's resolution, then average pooling.

    ``(N, in_channels, H', W') -> (N, out_channels, *size of h)``; ``C_out (C_in + 3)`` parameters.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
        )
        initialise(self)

    def forward(self, source: Tensor, h: Tensor) -> Tensor:
        return _match_size(self.encoder(source), h)


class ContextSupply(nn.Module):
    """``h + E(image) + sum_i R_i(input of module j_i)``: what module k >= 1 is fed instead of ``h``.

    Its encoders belong to module k: the loss of module k alone trains them, and inference runs them.

    Args:
        channels: channels of ``h``, the previous module's output.
        history_channels: channels of the inputs of modules 0 .. k-1 (the first is the image).
        count: n of ``R<n>``: how many of the most recent module inputs are supplied.
        image: whether the image is supplied through an :class:`ImageEncoder`. It is then not supplied a second
            time as the input of module 0.
    """

    def __init__(self, channels: int, history_channels: Sequence[int], count: int, image: bool) -> None:
        super().__init__()
        newest = len(history_channels) - 1
        oldest = 1 if image else 0
        self.sources = tuple(range(newest, max(oldest, newest - count + 1) - 1, -1))
        self.image = ImageEncoder(history_channels[0], channels) if image else None
        self.inputs = nn.ModuleList(InputEncoder(history_channels[i], channels) for i in self.sources)

    @property
    def needed(self) -> frozenset[int]:
        """Indices into the history of module inputs that are read."""
        return frozenset(self.sources) | ({0} if self.image is not None else frozenset())

    def forward(self, h: Tensor, history: Sequence[Tensor | None]) -> Tensor:
        """Merged input of the module; ``h`` and the history are read, never written."""
        merged = h
        if self.image is not None:
            merged = merged + self.image(history[0], h)
        for source, encoder in zip(self.sources, self.inputs, strict=True):
            merged = merged + encoder(history[source], h)
        return merged

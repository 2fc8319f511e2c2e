"""Context supplied to a local module (ContSup): encoders of the image and of earlier modules' inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import Features
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


def _match_size(z: Tensor, size: torch.Size) -> Tensor:
    if z.shape[-2:] == size:
        return z
    height, width = size
    if torch.compiler.is_compiling() and z.shape[-2] % height == 0 and z.shape[-1] % width == 0:
        # The same mean; Inductor of torch 2.11 cannot lower adaptive pooling to a size it takes for a variable.
        return z.unflatten(-1, (width, -1)).unflatten(-3, (height, -1)).mean((-3, -1))
    return F.adaptive_avg_pool2d(z, (height, width))


class ImageEncoder(nn.Module):
    """Context "E": two 3x3 convolutions with BatchNorm and ReLU at full resolution, then average pooling.

    ``(N, in_channels, S, S) -> (N, out_channels, *size)``, ``hidden`` channels in between; with 12 of them 360 + 111 C
    parameters for RGB images. Biases of the convolutions start at 0, or at torch's random values.
    """

    def __init__(self, in_channels: int, out_channels: int, hidden: int = 12, zero_biases: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, hidden, 3, padding=1),
            nn.BatchNorm2d(hidden),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, out_channels, 3, padding=1),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )
        initialise(self, zero_biases)

    def forward(self, image: Tensor, size: torch.Size) -> Tensor:
        return _match_size(self.encoder(image), size)


class InputEncoder(nn.Module):
    """Context "R": a 1x1 convolution with BatchNorm and ReLU at the source's resolution, then average pooling.

    ``(N, in_channels, H', W') -> (N, out_channels, *size)``; ``C_out (C_in + 3)`` parameters. The convolution's bias
    starts at 0, or at torch's random values.
    """

    def __init__(self, in_channels: int, out_channels: int, zero_biases: bool = True) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1), nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True)
        )
        initialise(self, zero_biases)

    def forward(self, source: Tensor, size: torch.Size) -> Tensor:
        return _match_size(self.encoder(source), size)


def supplied_inputs(module: int, count: int, image: bool) -> tuple[int, ...]:
    """Indices of the module inputs that ``R<count>`` supplies local module ``module`` with, the newest first.

    They are those of modules 0 .. module - 1; that of module 0 is the image, which is not supplied a second time.
    """
    newest, oldest = module - 1, 1 if image else 0
    return tuple(range(newest, max(oldest, newest - count + 1) - 1, -1))


class ContextSupply(nn.Module):
    """``h + E(image) + sum_i R_i(input of module j_i)``: what module k >= 1 receives instead of ``h``.

    Its encoders belong to module k: the loss of module k alone trains them, and inference runs them.

    Args:
        features: those of ``h``, the previous module's output.
        image: features of the image, if an :class:`ImageEncoder` supplies it; else None.
        inputs: features of the supplied module inputs, by index (:func:`supplied_inputs`).
        hidden: channels inside an :class:`ImageEncoder`.
        zero_biases: whether the biases of the encoders' convolutions start at 0 rather than torch's random values.

    Raises:
        ValueError: for features without height and width, which 2-D convolutions cannot encode.
    """

    def __init__(
        self,
        features: Features,
        image: Features | None,
        inputs: Mapping[int, Features],
        hidden: int = 12,
        zero_biases: bool = True,
    ) -> None:
        super().__init__()
        for read in (features, *([] if image is None else [image]), *inputs.values()):
            if not read.is_2d:
                raise ValueError(
                    f"context is encoded by 2-D convolutions and needs images and feature maps, not {read}; use "
                    "context='R0'"
                )
        self._features = features
        self._image = image
        self._inputs = dict(inputs)
        channels = features.channels
        self.image = None if image is None else ImageEncoder(image.channels, channels, hidden, zero_biases)
        self.inputs = nn.ModuleList(InputEncoder(source.channels, channels, zero_biases) for source in inputs.values())

    @property
    def needed(self) -> frozenset[int]:
        """Indices into the history of module inputs that are read."""
        return frozenset(self._inputs) | ({0} if self.image is not None else frozenset())

    def forward(self, h: Tensor, history: Sequence[Tensor | None]) -> Tensor:
        """Merged input of the module; ``h`` and the history are read, never written."""
        merged = h
        size = self._features.channels_first(h).shape[-2:]
        if self.image is not None and self._image is not None:
            merged = merged + self._features.restored(self.image(_read(self._image, history, 0), size))
        for (index, source), encoder in zip(self._inputs.items(), self.inputs, strict=True):
            merged = merged + self._features.restored(encoder(_read(source, history, index), size))
        return merged


def _read(features: Features, history: Sequence[Tensor | None], index: int) -> Tensor:
    source = history[index]
    assert source is not None
    return features.channels_first(source)

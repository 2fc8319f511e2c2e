"""How much a layer's output tells about the image and the label: estimates of mutual information.

I(h, x) is counted from the mean image. H(x) is not known, so the best guess without h takes its place: 0 means that h
tells nothing, and the largest possible value leaves only the images' own cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layers import Features
from ..models.blocks import BasicBlock, conv_bn_relu, initialise
from ..nn import PooledLinear
from ..ops.reconstruction_loss import reconstruction_loss
from .readout import Batch, Readout, Source, standardisation, train_readouts


@dataclass(frozen=True)
class LayerInformation:
    """Estimates for one layer's output h; informations in nats, errors on held-out data.

    Attributes:
        name: of the layer.
        reconstruction_error: binary cross-entropy of the image decoded from h, nats per value.
        image_information: ``blank_error - reconstruction_error``, nats per value: I(h, x) up to what a decoder knows
            without h; 0 for an h that tells nothing.
        label_information: ``label_entropy - cross-entropy`` of the strong probe: a lower bound of I(h, y), distorted
            by over-confidence where the probe over-fits (it may then be negative).
        accuracy: of the strong probe, as a fraction: the proxy for I(h, y) that InfoPro plots for that reason.
    """

    name: str
    reconstruction_error: float
    image_information: float
    label_information: float
    accuracy: float


@dataclass(frozen=True)
class Information:
    """Estimates for all layers, and the scale they are on.

    Attributes:
        label_entropy: H(y) of the held-out labels, nats: no label_information is above it.
        blank_error: binary cross-entropy of the mean training image, nats per value: an image_information of 0.
        perfect_error: that of the images themselves (their values are no bits), nats per value: no
            image_information is above ``blank_error - perfect_error``.
        layers: one per layer, the classifier last.
    """

    label_entropy: float
    blank_error: float
    perfect_error: float
    layers: list[LayerInformation]


def information(
    network: nn.Module,
    source: Source,
    num_classes: int,
    input_shape: tuple[int, int, int],
    mean: Sequence[float],
    std: Sequence[float],
    *,
    epochs: int = 10,
    probe_lr: float = 0.1,
    decoder_lr: float = 5e-3,
    probe_blocks: int = 5,
    seed: int = 0,
    bars: bool = False,
) -> Information:
    """I(h, x) by reconstruction and I(h, y) by a strong probe, for each layer's output h.

    ::

        I(h, x) = H(x) - H(x|h) >= H(x) - error of a decoder of h
        I(h, y) = H(y) - H(y|h) >= H(y) - cross-entropy of a classifier of h

    as InfoPro and ContSup estimate them; both are lower bounds, tighter the better decoder and classifier are. H(x) is
    not known, so image information is counted from the best guess that does not look at h, the mean image.

    Protocol, since the papers' own is not published: the network is frozen and in eval mode; decoder and probe take
    h, standardised per channel. The decoder has a convolution and two residual blocks at the resolution of h, and turns
    them into the image by pixel shuffle; its loss is the binary cross-entropy against the image in [0, 1],
    its optimizer Adam. The probe is a residual network of the size of ResNet-32 (three stages of ``probe_blocks``
    blocks) on maps, two hidden layers of 256 on vectors; SGD with Nesterov momentum 0.9 and weight decay 5e-4. Both
    train for ``epochs`` epochs of the source's training batches, with a cosine per step, and are scored on its held-out
    ones. Their size and the number of epochs move the estimates: compare only figures of equal settings.

    Args:
        network: :class:`auglocal_ext.LocalSequential` or ``nn.Sequential``.
        source: training and held-out batches.
        num_classes: number of classes.
        input_shape: ``(channels, height, width)`` of one image.
        mean: per channel, in units of 0..255: the network's input is ``(image - mean) / std``.
        std: per channel, in the same units.
        probe_blocks: residual blocks per stage; fewer take less time and give looser bounds.
        seed: of the decoders' and probes' weights.
        bars: show progress bars where standard error is a terminal.

    Raises:
        TypeError: for a network of another kind.
        ValueError: for fewer than one epoch or block, an empty source, a label out of range, inputs that are no images.

    Source: Wang et al., Revisiting Locally Supervised Learning, ICLR 2021; ContSup, arXiv 2312.07636.
    """
    if len(input_shape) != 3:
        raise ValueError(f"expected images, input_shape (channels, height, width), got {tuple(input_shape)}")
    if probe_blocks < 1:
        raise ValueError(f"probe_blocks must be at least 1, got {probe_blocks}")
    centre, spread = (torch.tensor(values, dtype=torch.float32) / 255 for values in (mean, std))
    train = partial(
        train_readouts, network, source=source, input_shape=input_shape, epochs=epochs, seed=seed, bars=bars
    )
    probes = train(make=lambda read: StrongProbe(read, num_classes, probe_blocks), lr=probe_lr, label="I(h, y) probes")
    decoders = train(
        make=lambda read: Decoder(read, input_shape, centre, spread), lr=decoder_lr, label="I(h, x) decoders"
    )
    seen, held_out = (_statistics(batches, centre, spread, num_classes) for batches in (source.train(1), source.test()))
    entropy = float(torch.special.entr(held_out.label_shares).sum())
    # It is linear in the image, so that of the mean image is the mean of all images'.
    blank = float(F.binary_cross_entropy(seen.image.clamp(1e-6, 1 - 1e-6), held_out.image))
    layers = [
        LayerInformation(name, shown.test_loss, blank - shown.test_loss, entropy - told.test_loss, told.test_accuracy)
        for (name, _, told), (_, _, shown) in zip(probes, decoders, strict=True)
    ]
    return Information(entropy, blank, held_out.own_error, layers)


def _channels_first(read: Features) -> tuple[int, ...]:
    """``(C, H, W)`` of maps or ``(C,)`` of vectors; ValueError for other features."""
    if not read.is_vector and not read.is_2d:
        raise ValueError(f"information is estimated of vectors and of maps with height and width, not of {read}")
    return (read.channels, *read.positions)


class StrongProbe(Readout):
    """A classifier that finds what a linear one does not: a residual network on maps, two hidden layers on vectors.

    Maps (C, H, W): a convolution, then three stages of ``blocks`` blocks of at least C, and at least 16, 32 and 64
    channels; the second and third stage halve maps of 16 positions a side and more. Global average pool, linear.
    """

    def __init__(self, read: Features, num_classes: int, blocks: int) -> None:
        super().__init__()
        self._read, shape = read, _channels_first(read)
        if len(shape) == 3:
            width, side = max(16, shape[0]), min(shape[1:])
            parts: list[nn.Module] = [conv_bn_relu(shape[0], width)]
            for stage in range(3):
                wanted = max(16 * 2**stage, shape[0])
                for block in range(blocks):
                    halve = stage > 0 and block == 0 and side >= 16
                    side = side // 2 if halve else side
                    parts.append(BasicBlock(width, wanted, 2 if halve else 1))
                    width = wanted
        else:
            width = 256
            sizes = (shape[0], width, width)
            parts = [
                part for n, m in pairwise(sizes) for part in (nn.Linear(n, m), nn.BatchNorm1d(m), nn.ReLU(inplace=True))
            ]
        self.standardise = standardisation(shape[0], len(shape) - 1)
        self.body = nn.Sequential(*parts)
        self.linear = PooledLinear(width, num_classes)
        initialise(self.body)

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4)

    def outcome(self, h: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, _, correct = self.linear.loss(self.body(self.standardise(self._read.channels_first(h.float()))), labels)
        return loss, correct


class _Residual(nn.Module):
    """``x + conv(relu(conv(x)))``, 3x3."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.relu(self.first(x)))


class Decoder(Readout):
    """The image out of a layer's output: residual blocks at its resolution, then pixel shuffle to the image's.

    A map a factor f smaller than the image is decoded with 16 f channels, 256 at most, which costs the same at every f.
    Where the image's side is no multiple of the map's, the map is resized (bilinear) to the image first. Of vectors a
    linear layer makes 64 channels at a quarter of the image's side, 8 at most. It starts at even odds for every value,
    and has no BatchNorm but that of its input: what a collapsed layer puts out, the same for all images, is no
    variance to divide by.
    """

    def __init__(self, read: Features, image_shape: tuple[int, int, int], mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self._read, shape = read, _channels_first(read)
        channels, *size = image_shape
        self.standardise = standardisation(shape[0], len(shape) - 1)
        self.start: nn.Module = nn.Identity()
        if len(shape) == 1:
            coarse = (64, *(min(8, -(-side // 4)) for side in size))
            self.start = nn.Sequential(
                nn.Linear(shape[0], math.prod(coarse)), nn.ReLU(inplace=True), nn.Unflatten(1, coarse)
            )
            shape = coarse
        factor = max(1, size[0] // shape[1])
        fits = [side * factor for side in shape[1:]] == size
        self.resized = None if fits else tuple(size)
        factor = factor if fits else 1
        width = min(16 * factor, 256)
        values = nn.Conv2d(width, channels * factor**2, 3, padding=1)
        nn.init.zeros_(values.weight)
        nn.init.zeros_(cast(Tensor, values.bias))
        self.body = nn.Sequential(
            nn.Conv2d(shape[0], width, 3, padding=1),
            nn.ReLU(inplace=True),
            _Residual(width),
            _Residual(width),
            nn.ReLU(inplace=True),
            values,
            nn.PixelShuffle(factor),
        )
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=lr)

    def outcome(self, h: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        h = self.start(self.standardise(self._read.channels_first(h.float())))
        if self.resized is not None:
            h = F.interpolate(h, self.resized, mode="bilinear", align_corners=False)
        loss = reconstruction_loss(self.body(h), images, self.mean, self.std)
        return loss, torch.zeros((), dtype=torch.int64, device=h.device)


@dataclass(frozen=True)
class _Statistics:
    """Mean image in [0, 1], mean binary cross-entropy of images with themselves, shares of the classes; fp64."""

    image: Tensor
    own_error: float
    label_shares: Tensor


def _statistics(batches: Iterator[Batch], mean: Tensor, std: Tensor, num_classes: int) -> _Statistics:
    total, own = torch.zeros((), dtype=torch.float64), 0.0
    counts = torch.zeros(num_classes, dtype=torch.float64)
    for x, labels in batches:
        centre, spread = (value.to(x.device).double().view(-1, 1, 1) for value in (mean, std))
        image = (x.double() * spread + centre).clamp(0, 1)
        total = total.to(x.device) + image.sum(0)
        own += float((torch.special.entr(image) + torch.special.entr(1 - image)).mean(dim=(1, 2, 3)).sum())
        counts += torch.bincount(labels.cpu(), minlength=num_classes)
    images = float(counts.sum())
    return _Statistics(total / images, own / images, counts / images)

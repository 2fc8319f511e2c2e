"""Auxiliary networks: from a local module's output to the logits and the local loss."""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from ..models.blocks import conv_bn_relu
from ..nn import PooledLinear, global_average_pool, recomputed
from ..ops import PooledCrossEntropy
from .base import Auxiliary, LocalLoss


class Head(nn.Module, ABC):
    """``linear(features(h))``: logits by ``forward(h)``, and by ``loss(h, target)`` with their loss in one pass.

    A head sets ``linear`` and says what is fed to it.
    """

    linear: PooledLinear

    @abstractmethod
    def features(self, h: Tensor) -> Tensor:
        """What ``linear`` is fed: a map ``(N, C, *positions)``, over which it pools, or ``(N, C)``."""

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(self.features(h))

    def loss(self, h: Tensor, target: Tensor, **options: Any) -> PooledCrossEntropy:
        return self.linear.loss(self.features(h), target, **options)


class LinearHead(Head):
    """``linear(global_average_pool(h))``, with a BatchNorm between the two where ``norm`` is set.

    Args:
        width: channels of the map ``(N, width, H, W)`` or features of ``(N, width)``.
        num_classes: K.
        norm: insert ``BatchNorm1d(width)`` before the linear layer (AugLocal's head of one sampled layer).
    """

    def __init__(self, width: int, num_classes: int, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(width) if norm else None
        self.linear = PooledLinear(width, num_classes)

    def features(self, h: Tensor) -> Tensor:
        if self.norm is None:
            return h
        return self.norm(global_average_pool(h))


class VGGHead(Head):
    """Flatten, adaptive average pool of the flat vector to 512, twice (linear 512, BatchNorm, ReLU), linear.

    The head of AugLocal's ImageNet VGG networks. The pooling runs along the flattened ``C*H*W`` vector.

    Args:
        num_classes: K.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool1d(512)
        self.hidden = nn.Sequential(
            nn.Linear(512, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(inplace=True),
            nn.Linear(512, 512),
            nn.BatchNorm1d(512),
            nn.ReLU(inplace=True),
        )
        self.linear = PooledLinear(512, num_classes)

    def features(self, h: Tensor) -> Tensor:
        return self.hidden(self.pool(h.flatten(1).unsqueeze(1)).squeeze(1))


class DGLHead(Head):
    """The classifiers of Decoupled Greedy Learning on a map ``(N, C, H, W)``.

    ``"mlp-sr"``: average pool to a quarter of the height and width, three 1x1 convolutions with BatchNorm and ReLU,
    average pool to 2x2, three linear layers of 4 C features with BatchNorm and ReLU. ``"mlp"``: the same without the
    convolutions. ``"cnn"``: two 3x3 convolutions with BatchNorm and ReLU at full size, average pool to 2x2, BatchNorm.
    Each ends in a linear layer on the 2x2 positions.

    Args:
        kind: one of ``DGL_HEADS``.
        width: C.
        size: ``(H, W)``.
        num_classes: K.

    Source: Belilovsky, Eickenberg and Oyallon, Decoupled Greedy Learning of CNNs, ICML 2020.
    """

    def __init__(self, kind: str, width: int, size: tuple[int, int], num_classes: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        if kind == "mlp-sr":
            parts.append(nn.AdaptiveAvgPool2d((math.ceil(size[0] / 4), math.ceil(size[1] / 4))))
            parts += [conv_bn_relu(width, width, kernel_size=1) for _ in range(3)]
        elif kind == "cnn":
            parts += [conv_bn_relu(width, width) for _ in range(2)]
        parts.append(nn.AdaptiveAvgPool2d(2))
        if kind == "cnn":
            parts.append(nn.BatchNorm2d(width))
        parts.append(nn.Flatten())
        if kind != "cnn":
            for _ in range(3):
                parts += [nn.Linear(4 * width, 4 * width), nn.BatchNorm1d(4 * width), nn.ReLU(inplace=True)]
        self.hidden = nn.Sequential(*parts)
        self.linear = PooledLinear(4 * width, num_classes)

    def features(self, h: Tensor) -> Tensor:
        return self.hidden(h)


DGL_HEADS = ("mlp-sr", "mlp", "cnn")


def pooled_size(shape: tuple[int, ...], limit: int) -> tuple[int, int]:
    """Height and width of a map ``(C, H, W)``, halved in turn until their product with C is at most ``limit``, or 1."""
    channels, height, width = shape
    while channels * height * width > limit and (height, width) != (1, 1):
        if height >= width:
            height = -(-height // 2)
        else:
            width = -(-width // 2)
    return height, width


class PredictionHead(Head):
    """PredSim's classifier: average pool until at most ``limit`` features are left, flatten, linear from zeros.

    Height and width are halved in turn. The linear layer starts at zero.

    Args:
        shape: ``(C, H, W)`` of a map, or ``(C,)``.
        num_classes: K.
        limit: largest number of features (``dim_in_decoder`` in the released code).

    Source: Noekland and Eidnes, Training Neural Networks with Local Error Signals, ICML 2019.
    """

    def __init__(self, shape: tuple[int, ...], num_classes: int, limit: int = 2048) -> None:
        super().__init__()
        self.pool: nn.Module = nn.Identity()
        features = shape[0]
        if len(shape) == 3:
            size = pooled_size(shape, limit)
            self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(size), nn.Flatten())
            features = shape[0] * size[0] * size[1]
        self.linear = PooledLinear(features, num_classes)
        nn.init.zeros_(self.linear.weight)
        if self.linear.bias is not None:
            nn.init.zeros_(self.linear.bias)

    def features(self, h: Tensor) -> Tensor:
        return self.pool(h)


class AuxiliaryNetwork(Auxiliary):
    """Blocks, then a head: ``head(blocks(h))``.

    ``forward(h)`` returns logits ``(N, num_classes)``; ``loss(h, target)`` the local loss with its top-1 count. With
    ``recompute=True`` the loss keeps only the input of each block and runs the block again for its backward.

    Args:
        blocks: maps the module's output ``(N, C, H, W)`` to what the head is fed.
        head: makes logits and loss of it.
    """

    def __init__(self, blocks: nn.Sequential, head: Head) -> None:
        super().__init__()
        self.blocks = blocks
        self.head = head

    def forward(self, h: Tensor) -> Tensor:
        return self.head(self.blocks(h))

    def loss(self, h: Tensor, target: Tensor, *, recompute: bool = False, **options: Any) -> LocalLoss:
        if recompute:
            for block in self.blocks:
                h = recomputed(block, h)
        else:
            h = self.blocks(h)
        return LocalLoss(*self.head.loss(h, target, **options))


CONV_HEADS = ("0c1f", "0c2f", "1c1f", "1c2f", "1c3f", "2c2f")


class _HiddenLinear(Head):
    """Global average pool, linear layers with ReLU, then :class:`PooledLinear` as the last one."""

    def __init__(self, width: int, hidden: int, num_hidden: int, num_classes: int) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for _ in range(num_hidden):
            parts += [nn.Linear(width, hidden), nn.ReLU(inplace=True)]
            width = hidden
        self.hidden = nn.Sequential(*parts)
        self.linear = PooledLinear(width, num_classes)

    def features(self, h: Tensor) -> Tensor:
        return self.hidden(global_average_pool(h))


def conv_head(
    config: str,
    width: int,
    last_width: int,
    num_classes: int,
    *,
    widen: float = 1.0,
    feature_dim: int = 128,
    is_map: bool = True,
) -> AuxiliaryNetwork:
    """The local classifiers ``<a>c<b>f`` of InfoPro and ContSup: a convolutions, pooling, b linear layers.

    The first convolution (3x3, no bias, BatchNorm, ReLU) doubles the width with stride 2, or keeps the width of
    the network's last stage with stride 1; hidden linear layers have ``feature_dim`` features. ``widen``
    multiplies both.

    Args:
        config: one of ``0c1f`` (greedy local learning), ``0c2f``, ``1c1f``, ``1c2f`` (the default of both papers),
            ``1c3f``, ``2c2f``.
        width: channels C of the module's output.
        last_width: channels of the network's last stage, at which the doubling stops.
        num_classes: K.
        widen: width factor (``aux_net_widen`` in the released code).
        feature_dim: features of the hidden linear layers.
        is_map: whether the module's output has positions; a vector takes only the heads without convolution.

    Raises:
        ValueError: for another ``config``, or a convolutional head on a vector.
    """
    match = re.fullmatch(r"(\d)c(\d)f", config)
    if match is None or config not in CONV_HEADS:
        raise ValueError(f"unknown auxiliary head {config!r}; choose one of {', '.join(CONV_HEADS)}")
    num_convs, num_linear = int(match[1]), int(match[2])
    if num_convs and not is_map:
        raise ValueError(
            f"head {config!r} needs a feature map (N, C, H, W), but the local module puts out a vector; "
            "use a head without convolutions: '0c1f' or '0c2f'"
        )
    blocks: list[nn.Module] = []
    for i in range(num_convs):
        if i == 0:
            base = min(2 * width, max(width, last_width))
            out, stride = int(base * widen), 2 if base > width else 1
            blocks.append(conv_bn_relu(width, out, stride=stride))
            width = out
        else:
            blocks.append(conv_bn_relu(width, width))
    if num_linear == 1:
        head: Head = LinearHead(width, num_classes)
    else:
        head = _HiddenLinear(width, int(feature_dim * widen), num_linear - 1, num_classes)
    return AuxiliaryNetwork(nn.Sequential(*blocks), head)

"""The classifiers of Decoupled Greedy Learning."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from ..auxiliary.base import LossSettings
from ..auxiliary.heads import AuxiliaryNetwork, Head
from ..layers import Features, vectors
from ..models.blocks import conv_bn_relu
from .base import HEADS, Network, Rule
from .heads import alone, refuse_pooling
from .options import option

#: Kinds of :class:`DGLHead`.
DGL_HEADS = ("mlp-sr", "mlp", "cnn", "mlp-sr-auglocal")


@dataclass(frozen=True)
class DGLHead(Rule):
    """The classifiers of Decoupled Greedy Learning, on maps with height and width.

    ``"mlp-sr"``: average pool to a quarter of the height and width, three 1x1 convolutions with BatchNorm and ReLU,
    average pool to 2x2, three linear layers of 4 C features with BatchNorm and ReLU. ``"mlp"``: the same without the
    convolutions. ``"cnn"``: two 3x3 convolutions with BatchNorm and ReLU at full size, average pool to 2x2, BatchNorm.
    Each ends in a linear layer on the 2x2 positions.

    ``"mlp-sr-auglocal"`` is the baseline in AugLocal's experiments: ``"mlp-sr"`` with two hidden linear layers in place
    of three, without biases. It has one position along an axis of at most 4, where a quarter is 1.

    Args:
        kind: one of ``DGL_HEADS``.
        init: ``"own"``: convolutions start from a normal distribution of variance 2 / (k C), with kernels of k values,
            as in DGL's code for ImageNet and in AugLocal's. ``"released"``: as torch makes them, as in DGL's code for
            CIFAR; AugLocal's head has the same values either way.

    Raises:
        ValueError: for another kind or ``init``; when wrapped, for a module that puts out anything but maps, and for a
            task whose outputs have positions.

    Source: Belilovsky, Eickenberg and Oyallon, Decoupled Greedy Learning of CNNs, ICML 2020.
    """

    kind: str = "mlp-sr"
    init: str = option("own", "initial values of convolutions", choices=("own", "released"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in DGL_HEADS:
            raise ValueError(f"unknown auxiliary head {self.kind!r}; choose one of {', '.join(DGL_HEADS)}")

    def build_auxiliary(self, network: Network, module: int) -> AuxiliaryNetwork:
        refuse_pooling(network, f"DGL's head {self.kind!r}")
        features = network.features(module)
        if not features.is_2d:
            raise ValueError(
                f"DGL's heads pool feature maps with height and width, but local module {module} puts out {features}; "
                "use another head, such as '0c2f', or Greedy()"
            )
        made = _DGL(self.kind, features, network.settings(module))
        if self.init == "released" and self.kind != "mlp-sr-auglocal":
            for part in made.modules():
                if isinstance(part, nn.Conv2d):
                    part.reset_parameters()
        return alone(made)


class _DGL(Head):
    def __init__(self, kind: str, features: Features, settings: LossSettings) -> None:
        super().__init__(settings)
        self._map = features
        width, size = features.channels, features.positions
        parts: list[nn.Module] = []
        quarter = (math.ceil(size[0] / 4), math.ceil(size[1] / 4))
        last = (2, 2)
        if kind == "cnn":
            parts += [conv_bn_relu(width, width) for _ in range(2)]
        elif kind != "mlp":
            parts.append(nn.AdaptiveAvgPool2d(quarter))
            parts += [conv_bn_relu(width, width, kernel_size=1) for _ in range(3)]
        if kind == "mlp-sr-auglocal":
            last = (min(quarter[0], 2), min(quarter[1], 2))
        parts.append(nn.AdaptiveAvgPool2d(last))
        if kind == "cnn":
            parts.append(nn.BatchNorm2d(width))
        parts.append(nn.Flatten())
        features_read = width * math.prod(last)
        depth = {"cnn": 0, "mlp-sr-auglocal": 2}.get(kind, 3)
        for _ in range(depth):
            linear = nn.Linear(features_read, features_read, bias=kind != "mlp-sr-auglocal")
            parts += [linear, nn.BatchNorm1d(features_read), nn.ReLU(inplace=True)]
        self.hidden = nn.Sequential(*parts)
        self.read = vectors(features_read)
        self.linear = nn.Linear(features_read, settings.task.outputs)

    def features(self, h: Tensor) -> Tensor:
        h = self._map.channels_first(h)
        if not self.settings.recompute:
            return self.hidden(h)
        convolutions = [i for i, part in enumerate(self.hidden) if isinstance(part, nn.Sequential)]
        starts = [0, *convolutions[1:]]
        for start, stop in zip(starts, [*starts[1:], len(self.hidden)], strict=True):
            h = self.run(self.hidden[start:stop], h)
        return h


HEADS |= {kind: partial(DGLHead, kind) for kind in DGL_HEADS}

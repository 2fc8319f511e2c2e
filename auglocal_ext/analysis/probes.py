"""How well a linear classifier tells the classes from each layer's output."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..layers import Features, pooled_size, pooling
from ..nn import PooledLinear
from .readout import Readout, Source, standardisation, train_readouts


@dataclass(frozen=True)
class LayerProbe:
    """Result of a layer's linear probe.

    Attributes:
        name: of the layer.
        features: number of features the probe took.
        train_accuracy: on the batches of the last epoch, while the probe was trained on them; a fraction.
        test_accuracy: on held-out data, a fraction.
        test_loss: cross-entropy on held-out data, nats.
    """

    name: str
    features: int
    train_accuracy: float
    test_accuracy: float
    test_loss: float


class LinearProbe(Readout):
    """``linear(standardise(pool(h)))``: average pool to ``max_features``, BatchNorm, linear from zeros."""

    def __init__(self, read: Features, num_classes: int, max_features: int) -> None:
        super().__init__()
        self._read = read
        size = pooled_size(read.channels, read.seen_positions, max_features)
        self.pool = pooling(read.seen_positions, size) or nn.Flatten()
        self.features = read.channels * math.prod(size if not isinstance(self.pool, nn.Flatten) else read.positions)
        self.standardise = standardisation(self.features, 0)
        self.linear = PooledLinear(self.features, num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def optimizer(self, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=lr / math.sqrt(self.features))

    def outcome(self, h: Tensor, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        loss, _, correct = self.linear.loss(self.standardise(self.pool(self._read.seen(h.float()))), labels)
        return loss, correct


def linear_probes(
    network: nn.Module,
    source: Source,
    num_classes: int,
    input_shape: tuple[int, ...],
    *,
    epochs: int = 30,
    lr: float = 0.1,
    max_features: int = 2048,
    seed: int = 0,
    bars: bool = False,
) -> list[LayerProbe]:
    """Accuracy of a linear classifier on each layer's frozen output: its linear separability.

    Protocol, since the papers' own is not published: the network is frozen and in eval mode; maps are average pooled,
    the longest axis of positions halved in turn, to at most ``max_features`` features (channels are never pooled),
    flattened and standardised by BatchNorm without weights, which leaves the classifier linear; cross-entropy, Adam, no
    weight decay, from weights of zero. The learning rate is ``lr`` over the square root of the number of features, so
    that a step moves the logits as far whatever their number, and falls as a cosine to 0 per step over ``epochs``
    epochs of the source's training batches. All probes are trained in one pass over the data.

    Args:
        network: :class:`auglocal_ext.LocalSequential` or ``nn.Sequential``.
        source: training and held-out batches.
        num_classes: number of classes.
        input_shape: of one image, ``(channels, height, width)`` or ``(features,)``.
        seed: of what the source leaves to chance.
        bars: show progress bars where standard error is a terminal.

    Raises:
        TypeError: for a network of another kind.
        ValueError: for fewer than one epoch, an empty source, a label out of range.
    """
    trained = train_readouts(
        network,
        lambda read: LinearProbe(read, num_classes, max_features),
        source,
        input_shape,
        epochs=epochs,
        lr=lr,
        seed=seed,
        label="linear probes",
        bars=bars,
    )
    return [
        LayerProbe(name, cast("LinearProbe", probe).features, s.train_accuracy, s.test_accuracy, s.test_loss)
        for name, probe, s in trained
    ]

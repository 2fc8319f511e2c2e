"""What an auxiliary network is to a local module: logits, a loss, and what it needs for it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor, nn


class LocalLoss(NamedTuple):
    """Scalar ``loss`` with graph; detached ``logits`` and top-1 count ``correct``, -1 where nothing is classified."""

    loss: Tensor
    logits: Tensor
    correct: Tensor


class Auxiliary(nn.Module, ABC):
    """Trains a local module: ``loss(h, target)`` of its output, and logits by ``forward(h)``.

    Attributes:
        reads_image: whether ``loss`` wants the network's input as ``image=``.
        classifies: whether ``forward(h)`` are logits ``(N, num_classes)``.
    """

    reads_image: bool = False
    classifies: bool = True

    @abstractmethod
    def loss(self, h: Tensor, target: Tensor, **options: Any) -> LocalLoss:
        """Local loss of the module's output.

        Args:
            h: ``(N, C, *positions)`` or ``(N, C)``.
            target: class indices ``(N,)``, int64.
            options: ``ignore_index``, ``label_smoothing``, ``check_labels`` as of
                :func:`auglocal_ext.ops.pooled_cross_entropy`; ``recompute=True``, if blocks are to keep only their
                inputs; ``image``, if :attr:`reads_image`.
        """

    def after_step(self) -> None:
        """Called after each backward of the module, and after its optimizer step where the step is by modules."""

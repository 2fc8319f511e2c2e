"""A classifier over a feature map: global average pool and linear layer, with its loss as one op."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import PooledCrossEntropy, pooled_cross_entropy
from .pooling import global_average_pool


class PooledLinear(nn.Linear):
    """logits = mean over positions(x) W^T + b.

    ``(N, C)`` or ``(N, C, *positions) -> (N, num_classes)``. Parameters, initialisation and state-dict keys are
    those of ``nn.Linear(in_features, num_classes, bias)``.
    """

    def __init__(self, in_features: int, num_classes: int, bias: bool = True) -> None:
        super().__init__(in_features, num_classes, bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, num_classes) in the dtype of x, differentiable any number of times."""
        return F.linear(global_average_pool(x), self.weight, self.bias)

    def loss(
        self,
        x: Tensor,
        target: Tensor,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        provider: str | None = None,
        check_labels: bool = True,
    ) -> PooledCrossEntropy:
        """Loss, logits and top-1 hits in one pass: see :func:`auglocal_ext.ops.pooled_cross_entropy`."""
        return pooled_cross_entropy(
            x,
            self.weight,
            self.bias,
            target,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            reduction=reduction,
            provider=provider,
            check_labels=check_labels,
        )

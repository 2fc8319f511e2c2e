"""Batch normalisation with residual and activation as modules, parameters and buffers those of ``nn.BatchNorm``."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.batch_norm_act import batch_norm_act
from ..ops.batch_norm_checks import ACTIVATIONS, slope_of
from ..ops.batch_norm_passes import passes
from ..ops.transforms import transforms_active
from .fusable import counted, norm_call
from .norm_act import count_as_updated, norm_act_in_training, norm_fits


class BatchNormAct2d(nn.BatchNorm2d):
    """y = act(batch_norm(x) + residual) over (N, C, H, W), activation "relu", "leaky_relu" or "none".

    The first five arguments, ``device`` and ``dtype``, initialisation, running statistics and state-dict keys are those
    of ``nn.BatchNorm2d``. ``forward(x, residual=None)`` takes a residual of x's shape and dtype. Between forward and
    backward only x, and where there is an activation the residual, is held.

    Empty batches, an ``eps`` that is not positive, transforms of ``torch.func`` and forward-mode AD are left to
    ``nn.BatchNorm2d`` and torch's activation.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        activation: str = "relu",
        negative_slope: float = 0.01,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        if activation not in ACTIVATIONS:
            raise ValueError(f"expected activation {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")
        self.activation = activation
        self.negative_slope = negative_slope

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """See :func:`auglocal_ext.ops.batch_norm_act`."""
        if x.numel() == 0 or not self.eps > 0 or (not torch.compiler.is_compiling() and transforms_active()):
            return self._by_torch(x, residual)
        self._check_input_dim(x)
        norm = norm_call(self)
        if norm_fits(norm, x, residual) and (recorded := passes(x).recorded) is not None:
            slope = slope_of(self.activation, self.negative_slope)
            count_as_updated([norm])
            return norm_act_in_training(recorded, x, norm, slope, residual)
        weight, bias, mean, var, batches, training, momentum, eps, _ = counted(norm)
        return batch_norm_act(
            x,
            weight,
            bias,
            mean,
            var,
            residual=residual,
            num_batches_tracked=batches,
            training=training,
            momentum=momentum,
            eps=eps,
            activation=self.activation,
            negative_slope=self.negative_slope,
        )

    def _by_torch(self, x: Tensor, residual: Tensor | None) -> Tensor:
        y = super().forward(x)
        if residual is not None:
            y = y + residual
        if self.activation == "none":
            return y
        return F.relu(y) if self.activation == "relu" else F.leaky_relu(y, self.negative_slope)

    def extra_repr(self) -> str:
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"{super().extra_repr()}, activation={self.activation!r}{slope}"


class BatchNormAct1d(BatchNormAct2d):
    """y = act(batch_norm(x) + residual) over (N, C) or (N, C, L), otherwise as :class:`BatchNormAct2d`."""

    def _check_input_dim(self, x: Tensor) -> None:
        nn.BatchNorm1d._check_input_dim(cast(Any, self), x)

"""Layers of timm, fused. Imports it: only :func:`auglocal_ext.fuse` imports this file."""

from __future__ import annotations

from timm.layers.norm import LayerNorm
from torch import Tensor

from .lean import register_lean
from .lean_norm import lean_layer_norm, norm_refusal

#: timm's flag of a layer for a faster kernel with dtypes of its own; only the flag for layers to come is public.
_FAST = "_fast_norm"


class FusedTimmLayerNorm(LayerNorm):
    """``timm.layers.LayerNorm`` as :func:`auglocal_ext.fuse` leaves it; timm's fast norm is its own."""

    def forward(self, x: Tensor) -> Tensor:
        lean = type(self) is FusedTimmLayerNorm and not getattr(self, _FAST, False)
        y = lean_layer_norm(self, x) if lean else None
        return super().forward(x) if y is None else y


register_lean(LayerNorm, FusedTimmLayerNorm, norm_refusal, begins=True)

"""Layers of Hugging Face's transformers, fused. Imports it: only :func:`auglocal_ext.fuse` imports this file."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import GELUActivation, NewGELUActivation
from transformers.pytorch_utils import Conv1D

from .lean import register_lean
from .lean_act import lean_gelu
from .lean_linear import lean_linear, readable
from .remade import recordable


class FusedConv1D(Conv1D):
    """``transformers.pytorch_utils.Conv1D``, GPT-2's linear layer, as :func:`auglocal_ext.fuse` leaves it."""

    def forward(self, x: Tensor) -> Tensor:
        source = readable(x, self.weight, self.bias)
        if source is None:
            return super().forward(x)
        return lean_linear(source, x, self.weight, self.bias, transposed=True)


class FusedNewGELU(NewGELUActivation):
    """``transformers.activations.NewGELUActivation``: torch's GELU in its tanh approximation, the same formula."""

    def forward(self, input: Tensor) -> Tensor:
        return lean_gelu(input, "tanh") if recordable(input) else super().forward(input)


class FusedGELUActivation(GELUActivation):
    """``transformers.activations.GELUActivation`` as :func:`auglocal_ext.fuse` leaves it."""

    def forward(self, input: Tensor) -> Tensor:
        return lean_gelu(input) if self.act is F.gelu else super().forward(input)


def _own_formula(module: nn.Module) -> str | None:
    return None if module.act is F.gelu else "computes GELU in Python"


register_lean(Conv1D, FusedConv1D)
register_lean(NewGELUActivation, FusedNewGELU, begins=True)
register_lean(GELUActivation, FusedGELUActivation, _own_formula, begins=True)

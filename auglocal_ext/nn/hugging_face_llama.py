"""The parts of Hugging Face's Llama, fused. Imports it: only :func:`auglocal_ext.fuse` imports this file."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from .fusable import replaced_call
from .lean import register_lean
from .lean_act import gated
from .lean_norm import lean_norm
from .remade import recordable


class FusedLlamaRMSNorm(LlamaRMSNorm):
    """``LlamaRMSNorm`` as :func:`auglocal_ext.fuse` leaves it; in float64, of which it takes a float32, as it is."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, weight = hidden_states, self.weight
        if (
            type(self) is not FusedLlamaRMSNorm
            or not recordable(x, weight)
            or not (x.requires_grad or weight.requires_grad)
            or x.dtype not in (torch.float32, torch.bfloat16, torch.float16)
            or torch.promote_types(x.dtype, weight.dtype) != x.dtype
            or weight.device != x.device
            or weight.shape != x.shape[-1:]
            or not self.variance_epsilon > 0
        ):
            return super().forward(x)
        return lean_norm(x, weight, None, float(self.variance_epsilon), True, x.dtype)


class FusedLlamaMLP(LlamaMLP):
    """``LlamaMLP`` as :func:`auglocal_ext.fuse` leaves it: of its hidden features gate and up alone are kept."""

    def forward(self, x: Tensor) -> Tensor:
        if gate_refusal(self) is not None or replaced_call(self.act_fn) is not None:
            return super().forward(x)
        out: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
        return out


def gate_refusal(module: nn.Module) -> str | None:
    """Why a gated MLP stays eager."""
    kind = type(module.act_fn)
    if kind is nn.SiLU or (kind.__module__, kind.__name__) == ("transformers.activations", "SiLUActivation"):
        return None
    return f"its gate is a {kind.__name__}, not SiLU"


register_lean(LlamaRMSNorm, FusedLlamaRMSNorm, begins=True)
register_lean(LlamaMLP, FusedLlamaMLP, gate_refusal, begins=True)

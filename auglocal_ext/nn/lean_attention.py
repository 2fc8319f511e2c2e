"""Attention that keeps q, k, v and its output once: torch's layer, and q and k rotated where they lie."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.registry import refuse_create_graph
from .lean_linear import linear
from .norm_act import PLAIN
from .remade import recordable

#: Rotates (N, heads, T, D), with True by the opposite angles.
Rotate = Callable[[Tensor, bool], Tensor]


def split_heads(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """``(N, T, 3 width)`` as three of ``(N, heads, T, D)``, views."""
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return q, k, v


def split_heads_rotated(qkv: Tensor, heads: int, rotate: Rotate) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`split_heads` with q and k rotated, for which ``qkv`` is overwritten: nobody may need it any more.

    Differentiable once.
    """
    q, k, v = _Rotated.apply(qkv, heads, rotate)
    return q, k, v


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, rotate: Rotate) -> tuple[Tensor, Tensor, Tensor]:
        ctx.how = heads, rotate, qkv.shape
        q, k, v = split_heads(qkv, heads)
        for part in (q, k):  # which counts as a change of qkv, so whoever has saved it is told
            part.copy_(rotate(part, False))
        return q, k, v

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            refuse_create_graph("a fused attention with rotary positions", PLAIN)
        heads, rotate, shape = ctx.how
        grad = grads[0].new_empty(shape)
        for i, (part, of_part) in enumerate(zip(split_heads(grad, heads), grads, strict=True)):
            part.copy_(of_part if i == 2 else rotate(of_part, True))
        return grad, None, None


def attention_refusal(module: nn.Module) -> str | None:
    """Why an ``nn.MultiheadAttention`` stays eager."""
    if module.in_proj_weight is None:
        return "has keys or values of another width"
    if not module.batch_first:
        return "takes the batch second"
    if module.bias_k is not None or module.bias_v is not None or module.add_zero_attn:
        return "adds to keys and values"
    return None


class FusedMultiheadAttention(nn.MultiheadAttention):
    """An ``nn.MultiheadAttention`` that :func:`auglocal_ext.fuse` has changed.

    In training, self-attention without masks whose weights are not asked for keeps q, k, v and its output once. Other
    calls are torch's. The output is contiguous; torch's has the strides of sequence first. Dropout draws in the order
    of the strides, so with the same seed a dropout after it drops other elements.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        masked = key_padding_mask is not None or attn_mask is not None or is_causal
        if masked or need_weights or not (query is key is value) or not self._lean(query):
            return super().forward(
                *(query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
            )
        q, k, v = split_heads(linear(query, self.in_proj_weight, self.in_proj_bias), self.num_heads)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return F.linear(y.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias), None

    def _lean(self, query: Tensor) -> bool:
        return (
            type(self) is FusedMultiheadAttention
            and attention_refusal(self) is None
            and recordable(query, self.in_proj_weight, self.in_proj_bias, self.out_proj.weight, self.out_proj.bias)
            and query.dim() == 3
            and query.shape[-1] == self.embed_dim
        )

"""Pre-norm transformer blocks, of which the language models and the vision transformers are made."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..nn.lean_attention import split_heads


def rotary(x: Tensor, base: float = 10_000.0, back: bool = False) -> Tensor:
    """``x`` with each pair of features ``(i, i + D/2)`` rotated by the angle ``t base^(-2i/D)`` at position t.

    ``(N, heads, T, D) -> (N, heads, T, D)``, D even. The angles are computed in fp32, for fp64 inputs in fp64. With
    ``back`` it is rotated by the opposite angles.

    Source: Su et al., RoFormer, 2021, with the pairs of GPT-NeoX and Llama.
    """
    length, size = x.shape[-2:]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    exponents = torch.arange(0, size, 2, device=x.device, dtype=dtype) / size
    angles = torch.outer(torch.arange(length, device=x.device, dtype=dtype), base**-exponents)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    if back:
        sin = -sin
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class SelfAttention(nn.Module):
    """``out(softmax(q k^T / sqrt(D)) v)`` with q, k, v the thirds of ``qkv(x)``; ``(N, T, width) -> (N, T, width)``.

    Args:
        width: of the tokens; a head has ``D = width / heads`` features.
        heads: number of heads.
        causal: whether a position attends to itself and earlier ones alone.
        rotary_positions: whether queries and keys are rotated by :func:`rotary`.
        bias: whether the linear layers have one.
        dropout: probability with which an attention weight is dropped.

    Raises:
        ValueError: if the heads do not divide the width, or if D is odd with rotary positions.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        causal: bool,
        rotary_positions: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads must divide the width, got {heads} heads and a width of {width}")
        if rotary_positions and width // heads % 2:
            raise ValueError(
                f"rotary positions need an even number of features per head, got {width} / {heads} = {width // heads}"
            )
        self.heads, self.causal, self.rotary_positions, self.dropout = heads, causal, rotary_positions, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.out = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads_of(x)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def heads_of(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of each head, ``(N, heads, T, D)``."""
        q, k, v = split_heads(self.qkv(x), self.heads)
        return (rotary(q), rotary(k), v) if self.rotary_positions else (q, k, v)

    def extra_repr(self) -> str:
        positions = ", rotary" if self.rotary_positions else ""
        return f"heads={self.heads}{', causal' if self.causal else ''}{positions}, dropout={self.dropout}"


class MLP(nn.Module):
    """``down(gelu(up(x)))``; ``(..., width) -> (..., width)``.

    Args:
        width: of the tokens.
        hidden: features of the hidden layer.
        approximate: ``"tanh"`` for the approximation of GPT-2, or ``"none"``.
        bias: whether the linear layers have one.
        dropout: probability with which a hidden feature is dropped.
    """

    def __init__(
        self, width: int, hidden: int, *, approximate: str = "none", bias: bool = True, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden, bias=bias)
        self.act = nn.GELU(approximate)
        self.dropout = nn.Dropout(dropout)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.dropout(self.act(self.up(x))))


class SwiGLU(nn.Module):
    """``down(silu(g) u)`` with g, u the halves of ``gate_up(x)``; ``(..., width) -> (..., width)``.

    Args:
        width: of the tokens.
        hidden: features of g and of u.
        bias: whether the linear layers have one.

    Source: Shazeer, GLU Variants Improve Transformer, 2020.
    """

    def __init__(self, width: int, hidden: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(width, 2 * hidden, bias=bias)
        self.down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """``h = x + dropout(attention(norm1(x)))``, then ``h + dropout(mlp(norm2(h)))``; ``(N, T, width)`` in and out.

    Args:
        norm1, attention, norm2, mlp: its parts.
        dropout: of what is added to the residual stream.
    """

    def __init__(
        self, norm1: nn.Module, attention: nn.Module, norm2: nn.Module, mlp: nn.Module, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm1, attention, norm2, mlp
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


def check_counts(**counts: int) -> None:
    """ValueError unless each is at least 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is at least 1, got {count}")


def check_dropout(dropout: float) -> None:
    """ValueError unless it is a probability less than 1."""
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is a probability, at least 0 and less than 1, got {dropout}")

"""Decoders for language modelling as ``nn.Sequential`` of their layers."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from .transformer import MLP, SelfAttention, SwiGLU, TransformerBlock, check_counts, check_dropout

Norm = Literal["rms", "layer"]
Positions = Literal["rotary", "learned"]
MLPKind = Literal["swiglu", "gelu"]
_STD = 0.02
_EPS = 1e-5


class TokenEmbedding(nn.Module):
    """Embeddings of tokens, with those of their positions added: ``(N, T)`` integers ``-> (N, T, width)``.

    Args:
        vocab_size: number of tokens.
        width: of the embeddings.
        context: longest T, for which positions have embeddings; None: none are added, and T is any.
        dropout: of the sum.

    Raises:
        ValueError: when called, for a sequence that is longer than ``context``.
    """

    def __init__(self, vocab_size: int, width: int, context: int | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, width)
        self.positions = None if context is None else nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """N(0, 0.02)."""
        for part in (self.tokens, self.positions):
            if part is not None:
                nn.init.normal_(part.weight, 0.0, _STD)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens)
        if self.positions is not None:
            length, context = tokens.shape[1], self.positions.num_embeddings
            if length > context:
                raise ValueError(f"the network has positions for a context of {context} tokens, got {length}")
            h = h + self.positions(torch.arange(length, device=tokens.device))
        return self.dropout(h)


class DecoderBlock(TransformerBlock):
    """A causal :class:`TransformerBlock` with the initialisation of GPT-2.

    Weights are N(0, 0.02), those of the two linear layers that write to the residual stream N(0, 0.02 / sqrt(2 L)) in
    a network of L blocks; biases are 0.

    Args:
        width, heads, mlp_width: of the tokens, the attention and the hidden layer.
        layers: L.
        norm: ``"rms"`` or ``"layer"``.
        positions: ``"rotary"``, or ``"learned"`` if the block adds none itself.
        mlp: ``"swiglu"`` or ``"gelu"``.
        bias: whether linear layers and LayerNorm have biases.
        dropout: of attention weights and of what is added to the residual stream.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        layers: int,
        *,
        norm: Norm = "rms",
        positions: Positions = "rotary",
        mlp: MLPKind = "swiglu",
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        rotary = positions == "rotary"
        super().__init__(
            make_norm(norm, width, bias),
            SelfAttention(width, heads, causal=True, rotary_positions=rotary, bias=bias, dropout=dropout),
            make_norm(norm, width, bias),
            SwiGLU(width, mlp_width, bias=bias)
            if mlp == "swiglu"
            else MLP(width, mlp_width, approximate="tanh", bias=bias),
            dropout,
        )
        self.layers = layers
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """See the class."""
        for name, part in self.named_modules():
            if isinstance(part, nn.Linear):
                scale = 1 / math.sqrt(2 * self.layers) if name in ("attention.out", "mlp.down") else 1.0
                nn.init.normal_(part.weight, 0.0, _STD * scale)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)


def make_norm(norm: Norm, width: int, bias: bool) -> nn.Module:
    """RMSNorm, or LayerNorm with or without bias, over the last axis."""
    return nn.RMSNorm(width, eps=_EPS) if norm == "rms" else nn.LayerNorm(width, eps=_EPS, bias=bias)


def gpt(
    layers: int = 12,
    width: int = 512,
    heads: int = 8,
    vocab_size: int = 256,
    context: int = 256,
    *,
    norm: Norm = "rms",
    positions: Positions = "rotary",
    mlp: MLPKind = "swiglu",
    mlp_width: int | None = None,
    bias: bool = False,
    tied: bool = False,
    dropout: float = 0.0,
) -> nn.Sequential:
    """A decoder: tokens ``(N, T)`` to the logits of the token after each, ``(N, T, vocab_size)``.

    Its children are ``embedding``, ``block_0``, ``block_1``, ..., ``norm`` and ``readout``, so it has ``layers + 1``
    local layers: the embedding, and the blocks; norm and readout belong to the last.

    The defaults are Llama's: RMSNorm, rotary positions, SwiGLU, no biases. ``gpt(norm="layer", positions="learned",
    mlp="gelu", bias=True, tied=True)`` is GPT-2's architecture. Weights start as GPT-2's do, N(0, 0.02), with those
    that write to the residual stream divided by sqrt(2 layers).

    Args:
        layers: number of blocks.
        width: of the residual stream.
        heads: of the attention; they divide the width.
        vocab_size: number of tokens; 256 for bytes.
        context: longest sequence. Rotary positions set no limit, so it is then not enforced.
        norm: ``"rms"`` or ``"layer"``, before attention, MLP and readout; eps 1e-5.
        positions: ``"rotary"``, base 10,000, or ``"learned"``, one embedding for each position.
        mlp: ``"swiglu"``, or ``"gelu"`` in its tanh approximation.
        mlp_width: features of the hidden layer; None: ``4 width`` for GELU, for SwiGLU ``8/3 width``, rounded up to a
            multiple of 64, which are about as many parameters.
        bias: whether linear layers and LayerNorm have biases; the readout has none.
        tied: whether readout and token embedding are one parameter. Where they belong to different local modules, both
            local losses train it, and wrapping the network warns of that. Stages on several devices cannot share it.
        dropout: of embeddings, attention weights and what is added to the residual stream.

    Raises:
        ValueError: for numbers that do not fit, or an unknown kind of norm, positions or MLP.

    Source: Radford et al., Language Models are Unsupervised Multitask Learners, 2019 (GPT-2); Touvron et al., LLaMA,
    2023.
    """
    check_counts(layers=layers, width=width, vocab_size=vocab_size, context=context)
    check_dropout(dropout)
    for name, value, known in (
        ("norm", norm, get_args(Norm)),
        ("positions", positions, get_args(Positions)),
        ("mlp", mlp, get_args(MLPKind)),
    ):
        if value not in known:
            raise ValueError(f"{name} is one of {', '.join(map(repr, known))}, got {value!r}")
    if mlp_width is None:
        mlp_width = 4 * width if mlp == "gelu" else -(-8 * width // 3 // 64) * 64
    check_counts(mlp_width=mlp_width)
    learned = context if positions == "learned" else None
    embedding = TokenEmbedding(vocab_size, width, learned, dropout)
    parts: OrderedDict[str, nn.Module] = OrderedDict(embedding=embedding)
    for i in range(layers):
        parts[f"block_{i}"] = DecoderBlock(
            *(width, heads, mlp_width, layers), norm=norm, positions=positions, mlp=mlp, bias=bias, dropout=dropout
        )
    parts["norm"] = make_norm(norm, width, bias)
    readout = nn.Linear(width, vocab_size, bias=False)
    nn.init.normal_(readout.weight, 0.0, _STD)
    if tied:
        readout.weight = embedding.tokens.weight
    parts["readout"] = readout
    return nn.Sequential(parts)

"""Vision transformers as ``nn.Sequential`` of their layers."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict
from typing import cast

import torch
from torch import Tensor, nn

from .transformer import MLP, SelfAttention, TransformerBlock, check_counts, check_dropout

_EPS = 1e-6


class PatchEmbedding(nn.Module):
    """Patches, each mapped linearly, after a class token, with position embeddings added.

    ``(N, 3, image_size, image_size) -> (N, 1 + (image_size / patch)^2, width)``.

    Raises:
        ValueError: if the patches do not divide the image; when called, for images of another size.
    """

    features_layout = "class_token"

    def __init__(self, width: int, patch: int, image_size: int, dropout: float = 0.0) -> None:
        super().__init__()
        if image_size % patch:
            raise ValueError(f"patch must divide image_size, got patches of {patch} and images of {image_size}")
        self.image_size = image_size
        self.proj = nn.Conv2d(3, width, patch, stride=patch)
        self.class_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + (image_size // patch) ** 2, width))
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Patches from N(0, 1 / sqrt(fan in)), positions from N(0, 0.02), the rest 0."""
        nn.init.normal_(self.proj.weight, std=1 / math.sqrt(self.proj.weight[0].numel()))
        nn.init.zeros_(cast("Tensor", self.proj.bias))
        nn.init.zeros_(self.class_token)
        nn.init.normal_(self.positions, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != (self.image_size, self.image_size):
            size = f"{self.image_size} x {self.image_size}"
            raise ValueError(f"the network takes images of {size}, got {' x '.join(map(str, x.shape[-2:]))}")
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(len(x), -1, -1), tokens), 1)
        return self.dropout(tokens + self.positions)


class EncoderBlock(TransformerBlock):
    """A :class:`TransformerBlock` in which all positions see each other, initialised as torchvision's.

    Args:
        width, heads, mlp_width: of the tokens, the attention and the hidden layer.
        dropout: of hidden features and of what is added to the residual stream.
    """

    features_layout = "class_token"

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float = 0.0) -> None:
        super().__init__(
            nn.LayerNorm(width, eps=_EPS),
            SelfAttention(width, heads, causal=False),
            nn.LayerNorm(width, eps=_EPS),
            MLP(width, mlp_width, dropout=dropout),
            dropout,
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weights, the attention's output as torch's linear layers; biases 0, the MLP's N(0, 1e-6)."""
        for name, part in self.named_modules():
            if not isinstance(part, nn.Linear):
                continue
            if name == "attention.out":
                nn.init.kaiming_uniform_(part.weight, a=math.sqrt(5))
            else:
                nn.init.xavier_uniform_(part.weight)
            nn.init.normal_(part.bias, std=1e-6 if name.startswith("mlp") else 0.0)


class ClassToken(nn.Module):
    """The first token: ``(N, T, width) -> (N, width)``."""

    def forward(self, h: Tensor) -> Tensor:
        return h[:, 0]


def vit(
    layers: int = 12,
    width: int = 768,
    heads: int = 12,
    patch: int = 16,
    image_size: int = 224,
    num_classes: int = 1000,
    *,
    mlp_width: int | None = None,
    dropout: float = 0.0,
) -> nn.Sequential:
    """A vision transformer: images ``(N, 3, image_size, image_size)`` to logits ``(N, num_classes)``.

    Its children are ``embedding``, ``block_0``, ``block_1``, ..., ``norm`` and ``classifier``, so it has ``layers + 1``
    local layers: the embedding, and the blocks; norm and classifier belong to the last. Heads read the class token.
    Outputs and initialisation are those of torchvision's networks of the same size, whose weights load by
    :func:`from_torchvision`.

    Args:
        layers: number of blocks.
        width: features of a token.
        heads: of the attention; they divide the width.
        patch: height and width of a patch.
        image_size: height and width of the images.
        num_classes: number of logits. Their weights start at 0.
        mlp_width: features of the hidden layers; ``4 width`` when None.
        dropout: of embeddings, hidden features and what is added to the residual stream.

    Raises:
        ValueError: for numbers that do not fit.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, 2021; the tiny and small sizes are those of Touvron et
    al., Training Data-Efficient Image Transformers, 2021.
    """
    mlp_width = 4 * width if mlp_width is None else mlp_width
    check_counts(
        layers=layers, width=width, patch=patch, image_size=image_size, num_classes=num_classes, mlp_width=mlp_width
    )
    check_dropout(dropout)
    parts: OrderedDict[str, nn.Module] = OrderedDict(embedding=PatchEmbedding(width, patch, image_size, dropout))
    for i in range(layers):
        parts[f"block_{i}"] = EncoderBlock(width, heads, mlp_width, dropout)
    parts["norm"] = nn.LayerNorm(width, eps=_EPS)
    fc = nn.Linear(width, num_classes)
    nn.init.zeros_(fc.weight)
    nn.init.zeros_(fc.bias)
    parts["classifier"] = nn.Sequential(OrderedDict(token=ClassToken(), fc=fc))
    return nn.Sequential(parts)


#: ViT-Tiny, 12 blocks of width 192 with 3 heads, patches of 16 x 16.
vit_t_16 = functools.partial(vit, 12, 192, 3, 16)
#: ViT-Small, 12 blocks of width 384 with 6 heads, patches of 16 x 16.
vit_s_16 = functools.partial(vit, 12, 384, 6, 16)
#: ViT-Base, 12 blocks of width 768 with 12 heads, patches of 16 x 16.
vit_b_16 = functools.partial(vit, 12, 768, 12, 16)
#: ViT-Base with patches of 32 x 32.
vit_b_32 = functools.partial(vit, 12, 768, 12, 32)
#: ViT-Large, 24 blocks of width 1024 with 16 heads, patches of 16 x 16.
vit_l_16 = functools.partial(vit, 24, 1024, 16, 16)
#: ViT-Large with patches of 32 x 32.
vit_l_32 = functools.partial(vit, 24, 1024, 16, 32)

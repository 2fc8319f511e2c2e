"""Small decoders for tests of language modelling."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from auglocal_ext import LanguageModelling, LocalSequential

VOCABULARY, LENGTH, WIDTH = 11, 7, 8


class Attending(nn.Module):
    """A pre-norm block of causal attention and an MLP, ``(N, T, C) -> (N, T, C)``."""

    def __init__(self, width: int, norm: type[nn.Module] = nn.RMSNorm) -> None:
        super().__init__()
        self.before, self.between = norm(width), norm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, h: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(h)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        h = h + self.out(attended)
        return h + self.mlp(self.between(h))


def decoder(blocks: int = 4, norm: type[nn.Module] = nn.RMSNorm, bias: bool = False) -> nn.Sequential:
    """Embedding, blocks, norm, readout."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH),
        *(Attending(WIDTH, norm) for _ in range(blocks)),
        norm(WIDTH),
        nn.Linear(WIDTH, VOCABULARY, bias=bias),
    )


def wrapped(rule, modules=None, layers=None, task=None, **options) -> LocalSequential:
    layers = decoder() if layers is None else layers
    example = torch.zeros(1, LENGTH, dtype=torch.int64)
    task = LanguageModelling(VOCABULARY) if task is None else task
    return LocalSequential(layers, rule, task=task, modules=modules, example_input=example, **options)


def tokens(samples: int = 3, seed: int = 5) -> tuple[Tensor, Tensor]:
    """Inputs and targets, some of them ignored."""
    drawn = torch.randint(VOCABULARY, (samples, LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    y = drawn[:, 1:].clone()
    y[0, :2] = -100
    return drawn[:, :-1], y


def literal_loss(logits: Tensor, y: Tensor, smoothing: float = 0.0, z: float = 0.0) -> Tensor:
    """The formula of the task, of all logits."""
    counts = y.flatten() != -100
    logits, labels = logits.flatten(0, 1)[counts], y.flatten()[counts]
    return F.cross_entropy(logits, labels, label_smoothing=smoothing) + z * logits.logsumexp(1).square().mean()


class Made(TorchDispatchMode):
    """Sizes of the tensors that operators outside of our ops make."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else [out]:
            if isinstance(each, Tensor):
                self.sizes.add(each.numel())
        return out

"""The transformers of ``benchmarks/memory.py``: how each is built, what it learns, and random batches of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from auglocal_ext import models
from auglocal_ext.tasks import Classification, LanguageModelling, Task

VOCABULARY, CONTEXT = 32_000, 2048
CLASSES, IMAGE = 1000, 224
_HEAD = 64  # features of an attention head, as in ViT-B, GPT-2 and Llama's first sizes
#: What ``benchmarks/memory.py`` calls them, for its help and its errors.
NAMES = "vit-b16, gpt-24x1024, or another depth and width as vit-LxW, gpt-LxW (Llama's parts) and gpt2-LxW (GPT-2's)"


@dataclass(frozen=True)
class Transformer:
    """``batch``: samples per step by default, images or sequences of ``CONTEXT`` tokens."""

    build: Callable[[], nn.Sequential]
    blocks: int
    input_shape: tuple[int, ...]
    batch: int
    is_text: bool

    def task(self) -> Task:
        return LanguageModelling(VOCABULARY) if self.is_text else Classification(CLASSES)

    def random_batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets on the default device, images in the default dtype."""
        if self.is_text:
            tokens = torch.randint(0, VOCABULARY, (2, count, *self.input_shape))
            return tokens[0].clone(), tokens[1].clone()
        return torch.randn(count, *self.input_shape), torch.randint(0, CLASSES, (count,))


def is_transformer(name: str) -> bool:
    return _parsed(name) is not None


def transformer(name: str) -> Transformer:
    """ValueError for a name that is none of ``NAMES``."""
    parsed = _parsed(name)
    if parsed is None:
        raise ValueError(f"unknown transformer {name!r}; expected {NAMES}")
    kind, layers, width = parsed
    heads = max(1, width // _HEAD)
    if kind == "vit":
        build = partial(models.vit, layers, width, heads, 16, IMAGE, CLASSES)
        return Transformer(build, layers, (3, IMAGE, IMAGE), 256, is_text=False)
    build = partial(models.gpt, layers, width, heads, vocab_size=VOCABULARY, context=CONTEXT)
    if kind == "gpt2":
        build = partial(build, norm="layer", positions="learned", mlp="gelu", bias=True)
    return Transformer(build, layers, (CONTEXT,), 8, is_text=True)


def _parsed(name: str) -> tuple[str, int, int] | None:
    """Kind, number of blocks and width."""
    if name == "vit-b16":
        return "vit", 12, 768
    found = re.fullmatch(r"(vit|gpt2?)-([1-9]\d*)x([1-9]\d*)", name)
    return None if found is None else (found[1], int(found[2]), int(found[3]))

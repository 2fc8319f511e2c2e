"""Learning rate per epoch: a cosine with linear warm-up."""

from __future__ import annotations

import math

WARMUP_START = 0.01
"""Learning rate of a warm-up's first epoch, in the released code and here."""


def cosine(epoch: int, epochs: int, lr: float) -> float:
    """``c(e) = lr / 2 * (1 + cos(pi * e / E))``."""
    return lr / 2 * (1 + math.cos(math.pi * epoch / epochs))


def learning_rate(epoch: int, epochs: int, lr: float, warmup: int) -> float:
    """``c(e) * (e-1)/W + 0.01 * (W+1-e)/W`` while e <= W, then ``c(e)``: the rate of epoch e = 1 .. E.

    With W = 10 this is the released code's formula. Its cosine is zero in the last epoch, e = E, where only
    BatchNorm's running statistics still move. A peak rate below 0.01 takes the 0.01's place, so that a
    warm-up never comes down from above. A run of one epoch would be that last epoch alone and train nothing: it
    has the constant rate ``lr``.
    """
    if not 1 <= epoch <= epochs:
        raise ValueError(f"epoch counts from 1 to {epochs}, got {epoch}")
    if epochs == 1:
        return lr
    if epoch > warmup:
        return cosine(epoch, epochs, lr)
    start = min(WARMUP_START, lr)
    return cosine(epoch, epochs, lr) * (epoch - 1) / warmup + start * (warmup + 1 - epoch) / warmup


def default_warmup(recipe_warmup: int, epochs: int) -> int:
    """``min(W, E // 4)``: the recipe's warm-up, shortened to a quarter of a run of fewer than 4 W epochs."""
    return min(recipe_warmup, epochs // 4)

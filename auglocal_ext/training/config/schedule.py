"""Learning rate: a cosine with linear warm-up, per epoch as published or for short runs, or per step."""

from __future__ import annotations

import math

WARMUP_START = 0.01
"""Learning rate of a warm-up's first epoch, in the released code and here."""

SCHEDULES = ("published", "short")

LAST = 0.1
"""Part of the peak rate that a language model's comes down to."""

PUBLISHED_FROM = 100
"""Epochs from which on a run has the published schedule unless it says otherwise; every recipe of a paper has more."""


def default_schedule(epochs: int) -> str:
    """``"published"`` from 100 epochs on, where one epoch at rate 0 is 1 % of the run at most; below ``"short"``."""
    return "published" if epochs >= PUBLISHED_FROM else "short"


def cosine(time: float, epochs: int, lr: float) -> float:
    """``c(t) = lr / 2 * (1 + cos(pi * t / E))``."""
    return lr / 2 * (1 + math.cos(math.pi * time / epochs))


def learning_rate(epoch: int, epochs: int, lr: float, warmup: int, schedule: str) -> float:
    """The rate of epoch e = 1 .. E: ``c(t) * u / W + 0.01 * (1 - u / W)`` while u < W, then ``c(t)``.

    ``"published"``: t = e and u = e - 1, which with W = 10 is the released code's formula. Its cosine is zero in the
    last epoch, where only BatchNorm's running statistics still move, and a warm-up's first epoch has the rate 0.01.

    ``"short"``: t = u = e - 1/2, the middle of the epoch. No epoch has the rate 0, and a warm-up of one epoch has
    about half the peak rate.

    A peak rate below 0.01 takes the 0.01's place, so that a warm-up never comes down from above. A published run of
    one epoch has the constant rate ``lr``: its only epoch would train nothing.
    """
    if not 1 <= epoch <= epochs:
        raise ValueError(f"epoch counts from 1 to {epochs}, got {epoch}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is one of {', '.join(SCHEDULES)}, not {schedule!r}")
    if schedule == "short":
        time = warmed = epoch - 0.5
    elif epochs == 1:
        return lr
    else:
        time, warmed = epoch, epoch - 1
    rate = cosine(time, epochs, lr)
    if warmed >= warmup:
        return rate
    return rate * warmed / warmup + min(WARMUP_START, lr) * (1 - warmed / warmup)


def default_warmup(recipe_warmup: int, epochs: int) -> int:
    """``min(W, E // 4)``: the recipe's warm-up, shortened to a quarter of a run of fewer than 4 W epochs."""
    return min(recipe_warmup, epochs // 4)


def warmup_of(warmup: int, steps: int) -> int:
    """``min(warmup, S // 10)``: at most a tenth of a run of S steps."""
    return min(warmup, steps // 10)


def rate_of_step(step: int, steps: int, lr: float, warmup: int) -> float:
    """The rate of step s = 1 .. S: ``lr s / W`` for the first W steps, then a cosine that ends at ``lr / 10``.

    W is ``warmup_of(warmup, S)``.
    """
    if not 1 <= step <= steps:
        raise ValueError(f"step counts from 1 to {steps}, got {step}")
    warmup = warmup_of(warmup, steps)
    if step <= warmup:
        return lr * step / warmup
    low = LAST * lr
    return low + cosine(step - warmup - 1, max(1, steps - warmup - 1), lr - low)

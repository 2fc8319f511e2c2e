"""Short texts, and runs on them."""

from __future__ import annotations

import random

from auglocal_ext.training import TrainConfig

WORDS = "the of and to in he was that his it with as for had is".split()


def text(words: int, seed: int = 1) -> str:
    drawn = random.Random(seed)
    return "".join(drawn.choice(WORDS) + drawn.choice((" ", " ", " ", "\n")) for _ in range(words))


def settings(tmp_path, **given) -> TrainConfig:
    """A run of a second on a text of 1,100 bytes."""
    data = tmp_path / "text.txt"
    if not data.exists():
        data.write_text(text(300))
    defaults = {
        "data": str(data),
        "output": str(tmp_path / "run"),
        "network": "gpt",
        "layers": 2,
        "width": 16,
        "heads": 2,
        "context_length": 16,
        "rule": "bp",
        "epochs": 2,
        "batch_size": 16,
        "sample": 4,
        "device": "cpu",
    }
    return TrainConfig(**{**defaults, **given})

"""Two providers that are chosen between without a time: ``cpu`` and ``reference``, which is none elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch

from auglocal_ext.ops import decisions, providers, tuning

RIVALS = ["cpu", "reference"]
_GENERATIONS = count(10**6, 10**6)  # whose calls are known to no other test


class Races:
    """What was raced, and the seconds that races find."""

    def __init__(self, fastest: str) -> None:
        self.runs: list[dict[str, Callable[[], None]]] = []
        self.seconds = {name: 1.0 if name == fastest else 2.0 for name in RIVALS}

    def __call__(self, runs: dict[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
        self.runs.append(dict(runs))
        return {name: self.seconds[name] for name in runs}

    def __len__(self) -> int:
        return len(self.runs)


def tune(monkeypatch: pytest.MonkeyPatch, folder: Any, fastest: str = "reference") -> Races:
    """Measuring is on from here, with decisions below ``folder``."""
    if not providers.available("cpu"):
        pytest.skip("two providers are needed")
    monkeypatch.setenv("AUGLOCAL_TUNE", "1")
    monkeypatch.delenv(providers.ENVIRONMENT, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(providers, "rivals", lambda op, device, dtype: list(RIVALS))
    monkeypatch.setattr(decisions, "_warned", [])
    for name, empty in (("lookups", {}), ("_decided", {}), ("_adopted", set())):
        monkeypatch.setattr(tuning, name, empty)
    monkeypatch.setattr(tuning, "generation", next(_GENERATIONS))
    races = Races(fastest)
    monkeypatch.setattr(tuning, "race", races)
    return races


def new_process() -> None:
    """Without what this one has decided so far."""
    tuning._decided.clear()
    tuning._adopted.clear()
    tuning.forget_lookups()

"""One thread in every process, as in those of ``ranks.py``."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """In the parent too."""

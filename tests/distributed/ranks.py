"""Real processes on gloo, for tests of what several of them do together."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing


def run(world: int, work: Callable[..., None], *args: Any) -> None:
    """Call ``work(rank, *args)`` in ``world`` processes of one gloo group; what fails in one fails here."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(_enter, (world, str(Path(folder) / "meeting"), work, args), nprocs=world)


def _enter(rank: int, world: int, meeting: str, work: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    work(rank, *args)
    os._exit(0)  # gloo's threads sometimes abort a process that tears them down on a busy machine

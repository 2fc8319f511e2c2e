"""Real processes on gloo, for tests of what several of them do together.

They are forked from a server that has imported torch and the package once. Importing them anew in each process would
take longer than most tests.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

#: What a process of these tests imports sooner or later, the part that is slow to import.
PRELOADED = [
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "torch._dynamo",
    "auglocal_ext",
    "auglocal_ext.distributed",
    "auglocal_ext.step",
    "pytest",
]


def run(world: int, work: Callable[..., None], *args: Any) -> None:
    """Call ``work(rank, *args)`` in ``world`` processes of one gloo group; what fails in one fails here."""
    multiprocessing.set_forkserver_preload(PRELOADED)
    call = pickle.dumps((work, args))  # in shared memory each tensor would need a file descriptor
    with tempfile.TemporaryDirectory() as folder:
        meeting = str(Path(folder) / "meeting")
        multiprocessing.start_processes(_enter, (world, meeting, call), nprocs=world, start_method="forkserver")


def _enter(rank: int, world: int, meeting: str, call: bytes) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    work, args = pickle.loads(call)
    work(rank, *args)
    os._exit(0)  # gloo's threads sometimes abort a process that tears them down on a busy machine

"""Real processes on gloo, for tests of what several of them do together.

They are forked from a server that has imported torch and the package once. Importing them anew in each process would
take longer than most tests.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import multiprocessing

import auglocal_ext

#: What takes long to import, of all that these tests use.
PRELOADED = [
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.device_mesh",
    "torch.distributed.fsdp",
    "auglocal_ext",
    "auglocal_ext.cli.train",
    "auglocal_ext.distributed",
    "pytest",
]


def run(world: int, work: Callable[..., None], *args: Any) -> None:
    """Call ``work(rank, *args)`` in ``world`` processes of one gloo group; what fails in one fails here."""
    call = pickle.dumps((work, args))  # in shared memory each tensor would need a file descriptor
    with tempfile.TemporaryDirectory() as folder:
        serve(folder)
        given = (world, str(Path(folder) / "meeting"), auglocal_ext.__file__, call)
        multiprocessing.start_processes(_enter, given, nprocs=world, start_method="forkserver")


def serve(folder: str) -> None:
    """Start the server where there is none, in an empty folder: before Python 3.12.4 it has no ``sys.path`` of ours."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", path)
        multiprocessing.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()


def check(package: str) -> None:
    """To be called first in each process: it has one thread, and the package that the tests have."""
    assert auglocal_ext.__file__ == package, f"the server has imported {auglocal_ext.__file__}, the tests {package}"
    torch.set_num_threads(1)


def _enter(rank: int, world: int, meeting: str, package: str, call: bytes) -> None:
    check(package)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    work, args = pickle.loads(call)
    work(rank, *args)
    os._exit(0)  # gloo's threads sometimes abort a process that tears them down on a busy machine

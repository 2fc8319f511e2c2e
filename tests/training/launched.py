"""The command line in several processes, forked from the server of ``distributed/ranks.py``.

They get what torchrun gives: its variables, a store that outlives them, an end of all when one fails, restarts. But
torchrun imports torch in each process, which takes longer than most runs.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from multiprocessing import connection
from pathlib import Path

import torch
from distributed import ranks
from torch import multiprocessing

import auglocal_ext
from auglocal_ext.cli import main
from auglocal_ext.training.run import trainer

SECONDS = 240  # for a run


def launch(
    size: int, arguments: Sequence[str], mishap: str | None = None, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m auglocal_ext`` with these arguments in ``size`` processes, with a mishap of ``mishap.py``.

    Returns:
        What ``subprocess.run`` does: the exit status of the first process that failed, and what all have printed.
    """
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as folder:
        ranks.serve(folder)
        status = 0
        for attempt in range(restarts + 1):
            common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "TORCHELASTIC_RESTART_COUNT": attempt}
            common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True}
            given = (auglocal_ext.__file__, folder, list(arguments), mishap)
            status = _attempt([(*given, common | {"RANK": rank, "LOCAL_RANK": rank}) for rank in range(size)])
            if status == 0:
                break
        stdout, stderr = ((Path(folder) / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(arguments, status, stdout, stderr)


def _attempt(calls: Sequence[tuple]) -> int:
    """The exit status of the first process that fails, after which the others are ended; 0 if none does."""
    processes = [multiprocessing.get_context("forkserver").Process(target=_enter, args=call) for call in calls]
    for process in processes:
        process.start()
    try:
        running = {process.sentinel: process for process in processes}
        while running:
            ended = connection.wait(running, SECONDS)
            assert ended, f"a process has run for {SECONDS} s"
            for process in [running.pop(sentinel) for sentinel in ended]:
                process.join()
                if process.exitcode:
                    return process.exitcode
        return 0
    finally:
        for process in processes:
            process.terminate()  # as torchrun does; nothing where it has ended
        for process in processes:
            process.join(30)
            process.kill()
            process.join()


def _enter(package: str, folder: str, arguments: list[str], mishap: str | None, environment: dict[str, object]) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        with (Path(folder) / name).open("a") as file:
            os.dup2(file.fileno(), number)
    ranks.check(package)
    trainer.draw_run = lambda path, *_: path.touch()  # as in conftest.py
    os.environ.update({name: str(value) for name, value in environment.items()})
    if mishap is not None:
        os.environ["MISHAP"] = mishap
        importlib.import_module("mishap")
    raise SystemExit(main(arguments))

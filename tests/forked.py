"""Python programs forked from the server of ``distributed/ranks.py``, which has imported torch: that takes seconds."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import DEVNULL, STDOUT  # noqa: F401 (this module stands for that one)
from typing import IO

from distributed import ranks
from torch import multiprocessing

import auglocal_ext
from auglocal_ext.training.run import trainer


class Popen:
    """``subprocess.Popen`` of ``python SCRIPT ...`` or ``python -m MODULE ...``: its options, files and signals.

    It has the package of the tests, wherever ``PYTHONPATH`` points, and draws no learning curves.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdin: int,
        stdout: IO[bytes],
        stderr: int,
        start_new_session: bool = False,
        preexec_fn: Callable[[], None] | None = None,
    ) -> None:
        before = os.setsid if start_new_session else preexec_fn
        given = (
            auglocal_ext.__file__,
            list(command[1:]),
            str(cwd),
            dict(env),
            str(Path(stdout.name).resolve()),
            before,
        )
        self._process = multiprocessing.get_context("forkserver").Process(target=_enter, args=given)
        with tempfile.TemporaryDirectory() as folder:
            ranks.serve(folder)
            self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def wait(self) -> int | None:
        self._process.join()
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)


def _enter(
    package: str, command: list[str], cwd: str, env: dict[str, str], output: str, before: Callable[[], None] | None
) -> None:
    if before is not None:
        before()
    with open(output, "ab") as file, open(os.devnull) as nothing:
        for source, number in ((nothing, 0), (file, 1), (file, 2)):
            os.dup2(source.fileno(), number)
    ranks.check(package)
    trainer.draw_run = lambda path, *_: path.touch()  # as in training/conftest.py
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")

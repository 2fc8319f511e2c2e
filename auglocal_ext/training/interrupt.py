"""Ctrl-C and SIGTERM as a request: the step in progress is finished before the run stops."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import suppress
from types import FrameType
from typing import Any


def ignore_interrupts(_: int) -> None:
    """For worker processes: Ctrl-C reaches them too, and what it means is the main process's to decide."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class InterruptRequest:
    """While entered, SIGINT and SIGTERM set ``requested``; a SIGINT after that raises KeyboardInterrupt as usual.

    A second SIGTERM changes nothing: schedulers send one to each process, and torchrun hands its own on.
    Outside the main thread, where Python allows no signal handlers, both keep their meaning. ``quiet``: print
    nothing, as in all processes of a run but one.

    Attributes:
        number: of the signal that came first; SIGINT before one has come.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self.requested = False
        self.number = int(signal.SIGINT)
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> InterruptRequest:
        self.requested = False
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler or signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.requested, self.number = True, number
        if self._quiet:
            return
        with suppress(RuntimeError):  # the signal came while standard error was written
            print("\nstopping after this step (Ctrl-C again: at once, without saving)", file=sys.stderr, flush=True)

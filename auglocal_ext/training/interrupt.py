"""Ctrl-C as a request: the step in progress is finished before the run stops."""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType
from typing import Any


def ignore_interrupts(_: int) -> None:
    """For worker processes: Ctrl-C reaches them too, and what it means is the main process's to decide."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class InterruptRequest:
    """While entered, the first SIGINT sets ``requested``; the second one raises KeyboardInterrupt as usual.

    Outside the main thread, where Python allows no signal handlers, SIGINT keeps its meaning. ``quiet``: print
    nothing, as in all processes of a run but one.
    """

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> InterruptRequest:
        self.requested = False
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
            self._previous = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._quiet:
            return
        print("\nstopping after this step (Ctrl-C again: at once, without saving)", file=sys.stderr, flush=True)

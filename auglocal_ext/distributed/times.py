"""Where the time of a process's steps goes: work, waiting for features, sending them, averaging gradients."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

KEPT = 8
"""Batches whose spans are kept, for a picture."""


@dataclass(frozen=True)
class Span:
    """A part of a step: ``"step"`` for all of it, else ``"waiting"``, ``"sending"`` or ``"averaging"``.

    ``start`` and ``end`` are seconds of the host's monotonic clock, which all processes of one host share.
    """

    kind: str
    start: float
    end: float


@dataclass
class StepTimes:
    """Seconds of the steps of one process so far, by the host's clock.

    Attributes:
        batches: steps.
        total: from the call of a step to its return.
        waiting: for the features of the stage before, or for the first batch to come through all of them.
        sending: handing features on, which includes waiting for the next stage to take those of the batch before.
        averaging: waiting until gradients have been averaged over the replicas.
        recent: the spans of each of the last few batches, the step itself last.
    """

    batches: int = 0
    total: float = 0.0
    waiting: float = 0.0
    sending: float = 0.0
    averaging: float = 0.0
    recent: deque[tuple[int, list[Span]]] = field(default_factory=lambda: deque(maxlen=KEPT))

    @property
    def busy(self) -> float:
        """The rest of the total."""
        return self.total - self.waiting - self.sending - self.averaging

    @contextmanager
    def step(self) -> Iterator[None]:
        """Entered for the whole of a step."""
        self.recent.append((self.batches, []))
        token = _running.set(self)
        try:
            with spent("step"):
                yield
        finally:
            _running.reset(token)
        self.batches += 1

    def _add(self, span: Span) -> None:
        name = "total" if span.kind == "step" else span.kind
        setattr(self, name, getattr(self, name) + span.end - span.start)
        self.recent[-1][1].append(span)


_running: ContextVar[StepTimes | None] = ContextVar("times of the step that runs", default=None)


@contextmanager
def spent(kind: str) -> Iterator[None]:
    """What runs within it is time of this kind, if it is part of a step that is timed."""
    times, start = _running.get(), time.monotonic()
    try:
        yield
    finally:
        if times is not None:
            times._add(Span(kind, start, time.monotonic()))

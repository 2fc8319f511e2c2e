"""Whole training steps as CUDA graphs: captured after some steps, replayed with one launch.

A graph belongs to a form and a state. The form is the shape of the batch. It must be seen several times in a row, or
twice if it is the smaller last batch of an epoch, whose graph shares the memory of the first. The state is everything
that Python would have decided anew: options of the optimizer, training flags, addresses. It is read before every
replay, without bytecode per parameter (``built_in.py``). When it changes, the graphs are dropped; after eight
captures the step stays eager.

The learning rate is a tensor that the graph reads. Batches are copied in and results out, so nothing that a caller
keeps is overwritten. Invalid targets are counted in the graph; the total goes to pinned memory, where a later call
reads it.

What cannot be captured is found before the capture. The last eager steps run with torch's warnings of
synchronisations on, which name the layer and the line. The optimizer also steps copies of a few parameters with its
learning rates as tensors. That shows whether it reads them on the host, or counts its steps there, which a graph
would freeze.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..local_sequential import LocalSequential
from ..ops.deferred import BadValueCounter
from .capture import CapturedGraph, can_capture, make_stream, on_stream, watch_for_waits
from .optimizers import ModuleOptimizers

MAX_CAPTURES = 8
"""A step whose options change at every call would be captured anew each time, which costs far more than it saves."""


class GraphCaptureError(RuntimeError):
    """The step cannot be captured, and ``graph=True`` asked for it."""


class NotForGraphs(Exception):
    """The message is why a step is not captured, found before it was tried."""


class Form(NamedTuple):
    """What a graph has built in of a batch: the number of samples, and shapes, strides and dtypes apart from that."""

    size: tuple[int, ...]
    sample: Any

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> Form:
        sample = (x.shape[1:], x.stride(), x.dtype, y.shape[1:], y.dtype, y.device)
        return cls((*x.shape[:1], *y.shape[:1]), sample)


class Way(Enum):
    """How a step runs that has no graph yet."""

    EAGER = "eager"
    WARM_UP = "eager, on the stream of the capture to come"
    CHECKED = "likewise, watched for what a graph cannot do"
    CAPTURE = "captured"


class GraphedStep:
    """A captured step with what it reads at a fixed address: a batch, the learning rates, a count of bad targets.

    Args:
        run: the step: ``run(x, y)`` returns tensors.
        x, y: a batch of the form to be captured; it is not trained on.
        optimizers: the optimizers that the step steps.
        net: the network.
        pool, stream: as in :class:`CapturedGraph`.

    Raises:
        NotForGraphs: if the optimizer reads the learning rates on the host, or keeps there what changes at every step.
    """

    def __init__(
        self,
        run: Callable[[Tensor, Tensor], Sequence[Tensor]],
        x: Tensor,
        y: Tensor,
        optimizers: ModuleOptimizers,
        net: LocalSequential,
        pool: Any,
        stream: Any,
    ) -> None:
        self._x, self._y = torch.empty_like(x), torch.zeros_like(y)
        self._groups = optimizers.whole.param_groups
        self._rates: list[float | None] = [None for _ in self._groups]
        self._rate_tensors = [torch.zeros((), device=x.device) for _ in self._groups]
        self._task = net.task
        self._bad = BadValueCounter(x.device)

        def counted() -> Sequence[Tensor]:
            self._bad.add(self._task.invalid(self._y))
            return run(self._x, self._y)

        optimizers.prepare(self._rate_tensors)
        _try_optimizer(optimizers)
        self._graph = CapturedGraph(counted, pool, stream)

    def __call__(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Train on a batch; the result is the caller's own, not overwritten by a later call.

        Raises:
            ValueError: if an earlier batch had targets that are not valid.
        """
        self._bad.raise_if_any(self._task.late_complaint)
        for index, group in enumerate(self._groups):
            rate = float(group.get("lr", 0.0))
            if rate != self._rates[index]:
                self._rate_tensors[index].fill_(rate)
                self._rates[index] = rate
        self._x.copy_(x, non_blocking=True)
        self._y.copy_(y, non_blocking=True)
        return [output.clone() for output in self._graph.replay()]


def _try_optimizer(optimizers: ModuleOptimizers) -> None:
    """Warm-up has learning rates on the host, a graph has tensors: what the optimizer makes of them shows on copies."""
    waits: list[str] = []
    with watch_for_waits(waits.append):
        kept = optimizers.try_step()
    name = type(optimizers.whole).__name__
    if waits:
        raise NotForGraphs(f"{name} waits for the device ({waits[0]}) if its learning rate is a tensor, as in graphs")
    if kept is not None:
        raise NotForGraphs(f"{name} keeps {kept} on the host and changes it at every step, which a graph would not")


class Graphs:
    """The captured steps of a :class:`LocalStep`, by the form of the batch, and why there is none.

    A step is captured after ``warmup + phases`` batches of its form in a row, or of what is the most frequent form so
    far; the smaller last batch of an epoch when it comes for the second time. All graphs are released when something
    changes that they have built in.

    Args:
        required: raise instead of giving up.
        warmup: eager steps before those that are checked; they make the optimizer's state and choose the libraries'
            algorithms.
        phases: steps in a row that may differ otherwise; so many are watched for what a graph cannot do.
    """

    def __init__(self, required: bool, warmup: int, phases: int) -> None:
        self._required = required
        self._warmup = warmup
        self._phases = phases
        self._graphs: dict[tuple[Form, Any], GraphedStep] = {}
        self._state: Any = None
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._captures = 0
        self._given_up: str | None = None
        self.reason: str | None = "no step has run yet"
        self._start()

    def _start(self) -> None:
        """Count anew."""
        self._key: tuple[Form, Any] | None = None
        self._in_a_row = 0
        self._seen: Counter[Form] = Counter()
        self._checked: set[tuple[Form, Any]] = set()
        self._smaller: Form | None = None  # of which a graph was tried, beside those of larger batches
        self._unfit: dict[tuple[Form, Any], str] = {}

    def find(
        self, x: Tensor, built_in: Callable[[], Any], form: Form, phase: Any, obstacle: str | None
    ) -> GraphedStep | Way:
        """The captured step for this batch, or how to run it.

        Args:
            built_in: tells what all graphs have built in.
            phase: which of several steps it is that differ otherwise.
            obstacle: a reason not to capture that the caller knows of.

        Raises:
            GraphCaptureError: if a graph is required and cannot be.
        """
        if not can_capture(x.device):
            obstacle = f"the batch is on {x.device.type}, CUDA graphs need a CUDA device"
        if obstacle is not None or self._given_up is not None:
            self.reason = obstacle or self._given_up
            self._raise_if_required()
            return Way.EAGER
        state = built_in()
        if state != self._state:
            self.clear()
            self._state = state
            self._start()
        last = None if self._key is None else self._key[0]
        self._key = key = (form, phase)
        self._in_a_row = self._in_a_row + 1 if form == last else 1
        self._seen[form] += 1
        graph = self._graphs.get(key)
        if graph is not None:
            self.reason = None
            return graph
        if self._stream is None or self._stream.device != x.device:
            self._stream = make_stream(x.device)
        return self._way_of_last_batch(key) if self._is_last_batch() else self._way_of_usual_batch(key)

    def outdate(self) -> None:
        """Release all graphs before the next step: they have something built in that ``built_in`` does not tell."""
        self._state = None

    def _is_last_batch(self) -> bool:
        """Whether this is a single batch that but for its size is one of which there is a graph."""
        assert self._key is not None
        form = self._key[0]
        larger = any(form.size < other.size and form.sample == other.sample for other, _ in self._graphs)
        return larger and self._in_a_row == 1

    def _way_of_last_batch(self, key: tuple[Form, Any]) -> Way:
        if key in self._unfit:
            self.reason = self._unfit[key]
            return Way.EAGER
        self.reason = "a smaller batch is captured when it comes again"
        if key not in self._checked:
            return Way.CHECKED
        if self._smaller not in (None, key[0]):
            self.reason = "smaller batches are captured in one size alone"
            return Way.EAGER
        return Way.CAPTURE

    def _way_of_usual_batch(self, key: tuple[Form, Any]) -> Way:
        if self._captures >= MAX_CAPTURES:
            self.reason = f"captured {MAX_CAPTURES} times already: the step's options or batches keep changing"
            return Way.EAGER
        usual = self._seen[key[0]] == max(self._seen.values())
        steps = max(self._in_a_row, self._seen[key[0]] if usual else 0)
        self.reason = f"captured after {self._warmup + self._phases} batches of one form"
        if steps <= self._warmup:
            return Way.WARM_UP
        if steps <= self._warmup + self._phases or key not in self._checked:
            return Way.CHECKED
        return Way.CAPTURE

    @contextmanager
    def around(self, way: Way, running: Callable[[], str]) -> Iterator[None]:
        """Around a step that runs without a graph.

        Args:
            running: what is being run, for the message.
        """
        if way is Way.EAGER:
            yield
            return
        waits: list[str] = []
        with on_stream(self._stream):
            if way is Way.CHECKED:
                with watch_for_waits(lambda place: waits.append(f"{running()} waits for the device ({place})")):
                    yield
            else:
                yield
        if waits:
            self._give_up(f"{waits[0]}, which a graph cannot")
        elif way is Way.CHECKED:
            assert self._key is not None
            self._checked.add(self._key)

    def capture(self, make: Callable[[Any, Any], GraphedStep], running: Callable[[], str]) -> GraphedStep | None:
        """``make(pool, stream)``, kept for the batch that :meth:`find` was asked for; None if it fails.

        Args:
            running: what was being recorded, for the message.

        Raises:
            GraphCaptureError: if a graph is required.
        """
        assert self._key is not None
        if self._is_last_batch():
            self._smaller = self._key[0]
        else:
            self._captures += 1
        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        try:
            graph = make(self._pool, self._stream)
        except Exception as error:
            self._pool = None  # torch 2.11 may not let another capture begin in it
            message = str(error).strip().splitlines() or [""]
            reason = f"capturing {running()} failed: {type(error).__name__}: {message[0]}"
            self._give_up(str(error) if isinstance(error, NotForGraphs) else reason)
            if self._given_up is not None:
                self._raise_if_required(error)
            return None
        self._graphs[self._key] = graph
        self.reason = None
        return graph

    def clear(self) -> None:
        """Release all graphs and their memory."""
        if self._graphs and self._stream is not None:
            torch.cuda.synchronize(self._stream.device)  # a graph that still runs must not lose its memory
        self._graphs.clear()
        self._pool = None

    def _give_up(self, reason: str) -> None:
        """Run steps eagerly from now on: all of them, or those of the last batch alone."""
        assert self._key is not None
        self.reason = reason
        if self._is_last_batch():
            self._unfit[self._key] = reason
        else:
            self._given_up = reason
            self.clear()

    def _raise_if_required(self, cause: Exception | None = None) -> None:
        if self._required:
            raise GraphCaptureError(f'{self.reason}. Pass graph="auto" to run such steps eagerly') from cause

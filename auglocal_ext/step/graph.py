"""Whole training steps as CUDA graphs: captured after some steps, replayed with one launch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..local_sequential import LocalSequential
from ..ops.deferred import BadValueCounter
from .optimizers import ModuleOptimizers

MAX_CAPTURES = 8
"""A step whose options change at every call would be captured anew each time, which costs far more than it saves."""


class GraphCaptureError(RuntimeError):
    """The step cannot be captured, and ``graph=True`` asked for it."""


class CapturedGraph:
    """``run()`` recorded into a CUDA graph; its outputs are overwritten by every replay.

    Args:
        run: makes the outputs; it is recorded, not carried out. It may not read a value on the host.
        pool: memory pool shared with other graphs that never run at the same time.
    """

    def __init__(self, run: Callable[[], Sequence[Tensor]], pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # A loader's thread may pin memory and ask after events meanwhile, which a global capture would not survive.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self._outputs = run()

    def replay(self) -> Sequence[Tensor]:
        self._graph.replay()
        return self._outputs


def can_capture(device: torch.device) -> bool:
    """Whether steps on ``device`` can be captured at all."""
    return device.type == "cuda"


class GraphedStep:
    """A captured step with what it reads at a fixed address: a batch, the learning rates, a count of bad targets.

    Args:
        run: the step: ``run(x, y)`` returns tensors.
        x, y: a batch of the form to be captured; it is not trained on.
        optimizers: the optimizers that the step steps.
        net: the network.
        pool: as in :class:`CapturedGraph`.
    """

    def __init__(
        self,
        run: Callable[[Tensor, Tensor], Sequence[Tensor]],
        x: Tensor,
        y: Tensor,
        optimizers: ModuleOptimizers,
        net: LocalSequential,
        pool: Any,
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
        self._graph = CapturedGraph(counted, pool)

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


class Graphs:
    """The captured steps of a :class:`LocalStep`, by the form of the batch, and why there is none.

    A step is captured after ``warmup`` batches of its form in a row, or of what is the most frequent form so far: the
    smaller last batch of an epoch never is. All graphs are let go of when something changes that they have built in.

    Args:
        required: raise instead of giving up.
        warmup: eager steps before a capture; they make the optimizer's state and choose the libraries' algorithms.
    """

    def __init__(self, required: bool, warmup: int) -> None:
        self._required = required
        self._warmup = warmup
        self._graphs: dict[Any, GraphedStep] = {}
        self._state: Any = None
        self._pool: Any = None
        self._form: Any = None
        self._in_a_row = 0
        self._seen: Counter[Any] = Counter()
        self._captures = 0
        self._given_up: str | None = None
        self.reason: str | None = "no step has run yet"

    def find(
        self, x: Tensor, built_in: Callable[[], Any], form: Any, phase: Any, obstacle: str | None
    ) -> GraphedStep | bool:
        """The captured step for this batch; else True where it is to be captured now, False to run eagerly.

        Args:
            built_in: tells what all graphs have built in.
            form: shapes and dtypes of the batch.
            phase: which of several steps it is that differ otherwise.
            obstacle: a reason not to capture that the caller knows of.

        Raises:
            GraphCaptureError: if a graph is required and cannot be.
        """
        if not can_capture(x.device):
            obstacle = f"the batch is on {x.device.type}, CUDA graphs need a CUDA device"
        if obstacle is not None or self._given_up is not None:
            return self._eager(obstacle or self._given_up, required=True)
        state = built_in()
        if state != self._state:
            self.clear()
            self._state = state
            self._in_a_row = 0
            self._seen.clear()
        self._in_a_row = self._in_a_row + 1 if form == self._form else 1
        self._form = form
        self._seen[form] += 1
        graph = self._graphs.get((form, phase))
        if graph is not None:
            self.reason = None
            return graph
        if self._captures >= MAX_CAPTURES:
            return self._eager(f"captured {MAX_CAPTURES} times already: the step's options or batches keep changing")
        usual = self._seen[form] > self._warmup and self._seen[form] == max(self._seen.values())
        if self._in_a_row <= self._warmup and not usual:
            return self._eager(f"captured after {self._warmup} batches of one form")
        return True

    def capture(self, make: Callable[[Any], GraphedStep], phase: Any, running: Callable[[], str]) -> GraphedStep | None:
        """``make(pool)``, kept for the form that :meth:`find` was asked for; None if it fails.

        Args:
            running: what was being recorded, for the message.
        """
        self._captures += 1
        if self._pool is None and torch.cuda.is_available():
            self._pool = torch.cuda.graph_pool_handle()
        try:
            graph = make(self._pool)
        except Exception as error:
            message = str(error).strip().splitlines() or [""]
            self._given_up = f"capturing {running()} failed: {type(error).__name__}: {message[0]}"
            self._eager(self._given_up, required=True, cause=error)
            return None
        self._graphs[(self._form, phase)] = graph
        self.reason = None
        return graph

    def clear(self) -> None:
        """Let go of all graphs and their memory."""
        if self._graphs and torch.cuda.is_available():
            torch.cuda.synchronize()  # a graph that still runs must not lose its memory
        self._graphs.clear()
        self._pool = None

    def _eager(self, reason: str | None, required: bool = False, cause: Exception | None = None) -> bool:
        self.reason = reason
        if required and self._required:
            raise GraphCaptureError(f'{reason}. Pass graph="auto" to run such steps eagerly') from cause
        return False

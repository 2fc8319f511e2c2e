"""One row of ``benchmarks/step.py``: predicted, timed and counted, each part of which may fail by itself."""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from _counters import count_launches, count_operators, count_synchronisations
from _networks import compiling
from _resume import LEFT_OUT
from _step_rows import Row, Step
from _timing import Spread, time_steps

from auglocal_ext.memory import MemoryReport, estimate_step, read_device_memory, release_device_memory

CAPTURED = 5  # calls of a step after which it runs as a graph, if it can


@dataclass(frozen=True)
class Settings:
    """``batch``: of the peaks, and on CUDA of everything. ``timed_batch``: of times and counts; 0 leaves both out.

    ``seconds``: spent on the timed steps of a row; 0 counts without timing. ``row_limit``: seconds after which a row is
    given up. ``deadline``: by ``time.monotonic``, after which no row is begun.
    """

    device: str
    batch: int
    timed_batch: int
    seconds: float
    row_limit: float
    deadline: float = math.inf

    @property
    def cuda(self) -> bool:
        return self.device == "cuda"


@dataclass
class Result:
    """What came out of one row; ``errors`` by the part that failed: "prediction", "step" or "counts".

    ``recompute``: what was planned for each local module, at ``batch``, and ``planned`` the peak it was chosen for.
    """

    row: Row
    predicted: MemoryReport | None = None
    time: Spread | None = None
    images_per_second: float | None = None
    allocated: int | None = None
    reserved: int | None = None
    counts: dict[str, Any] = field(default_factory=dict)
    graphed: bool | None = None
    eager_reason: str | None = None
    recompute: tuple[str, ...] | None = None
    planned: int | None = None
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int | None:
        return self.allocated if self.predicted is None else self.predicted.peak_bytes

    def as_dict(self) -> dict[str, Any]:
        row = self.row
        return {
            "name": row.name,
            "family": row.family,
            "adds": row.adds,
            "depth": row.depth,
            "dtype": row.dtype,
            "channels_last": row.half,
            "compiled": row.compiled,
            "options": row.options,
            "predicted_peak_bytes": self.predicted and self.predicted.peak_bytes,
            "predicted_categories": self.predicted and self.predicted.categories,
            "allocated_peak_bytes": self.allocated,
            "reserved_peak_bytes": self.reserved,
            "seconds_per_step": self.time and asdict(self.time),
            "images_per_second": self.images_per_second,
            "counts": self.counts,
            "graphed": self.graphed,
            "eager_reason": self.eager_reason,
            "recompute": self.recompute and dict(Counter(self.recompute)),
            "planned_peak_bytes": self.planned,
            "errors": self.errors,
        }


def run_row(row: Row, network: str, settings: Settings) -> Result:
    """One row; what goes wrong in it is its result, and the others go on."""
    result = Result(row)
    if time.monotonic() > settings.deadline:
        result.errors["step"] = LEFT_OUT
        return result
    if not settings.cuda and not row.compiled:
        with recorded(result, "prediction"), time_limit(settings.row_limit):
            result.predicted = predict(result, network, settings.batch)
    if settings.timed_batch:
        with recorded(result, "step"), time_limit(settings.row_limit):
            _run(result, network, settings)
    gc.collect()
    return result


def predict(result: Result, network: str, batch: int) -> MemoryReport:
    def build() -> tuple[Callable[[Callable[[str], None]], None], Any]:
        step = result.row.build(result.row, network, batch)
        note_plan(result, step)
        return step, step.tracked

    return estimate_step(build)


def note_plan(result: Result, step: Step) -> None:
    plan = None if step.owner is None else step.owner.plan
    if plan is not None:
        result.recompute = plan.recompute
        result.planned = plan.predicted_bytes


def _run(result: Result, network: str, settings: Settings) -> None:
    row = result.row
    if result.recompute is not None:  # the small batch runs what was planned for the large one
        row = replace(row, options={**row.options, "recompute": result.recompute})
    if settings.cuda:
        release_device_memory()
    with compiling(row.compiled, row.budget):
        with torch.device(settings.device):
            step = row.build(row, network, settings.timed_batch)
        owner = step.owner
        if settings.cuda:
            note_plan(result, step)
        for _ in range(1 if not settings.cuda else 2 if owner is None else CAPTURED):
            step()
        if owner is not None:
            result.graphed = owner.graphed
            result.eager_reason = owner.eager_reason if row.options["graph"] else None
        if settings.seconds or settings.cuda:
            _time(result, step, settings)
        if settings.cuda or not row.compiled:  # under the mode that counts, compiled code would run eagerly
            with recorded(result, "counts"):
                result.counts = _count(step, settings)


def _time(result: Result, step: Step, settings: Settings) -> None:
    if not settings.cuda:
        result.time = time_steps(step, "cpu", settings.seconds)
    else:
        warm = read_device_memory()
        release_device_memory()
        result.time = time_steps(step, "cuda", settings.seconds)
        after = read_device_memory()
        # What a replay uses was allocated when the step was captured, and the allocator counts it no second time.
        result.allocated = warm.allocated_peak if result.graphed else after.allocated_peak
        result.reserved = after.reserved_peak
    result.images_per_second = settings.timed_batch / result.time.median


def _count(step: Step, settings: Settings) -> dict[str, Any]:
    if not settings.cuda:
        return count_operators(step)
    synchronisations = count_synchronisations(step)
    counts = count_launches(step)
    return {"host_synchronisations": max(synchronisations, counts["waits"]), **counts}


@contextlib.contextmanager
def recorded(result: Result, part: str) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        result.errors[part] = "out of memory"
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        result.errors[part] = text if len(text) <= 400 else f"{text[:400]} ..."


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises ``TimeoutError`` within the block after ``seconds``; where the system has no such alarm, never."""
    if not hasattr(signal, "SIGALRM") or seconds == math.inf:
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TimeoutError(f"given up after {seconds:.0f} s (--row-limit)")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 30)  # again, should a destructor have swallowed the first
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

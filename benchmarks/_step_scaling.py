"""How the peak and the time of a step grow with depth and with batch, for ``benchmarks/step.py``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from _step_measure import Result, Settings, run_row
from _step_rows import Row, rows

DEPTHS = {"cpu": (20, 56, 110), "cuda": (20, 56, 110, 434, 1202)}
ALL_DEPTHS = (20, 32, 56, 110, 218, 434, 1202)
BATCHES = {"cpu": (256, 1024, 4096), "cuda": (64, 256, 1024, 4096)}
BATCH_NETWORK = "resnet32"


@dataclass(frozen=True)
class Point:
    """One row at one network and batch; ``over`` is "depth" or "batch", ``at`` its value."""

    over: str
    at: int
    network: str
    batch: int
    row: Row


def points(batch: int, depths: Sequence[int], batches: Sequence[int]) -> list[Point]:
    """Every line at every depth (at ``batch``) and at every batch (of one network), the small ones first."""
    lines = scaling_rows()
    over_depth = [Point("depth", d, f"resnet{d}", batch, row) for d in sorted(depths) for row in lines]
    over_batch = [Point("batch", b, BATCH_NETWORK, b, row) for b in sorted(batches) for row in lines]
    return over_depth + over_batch


def scaling_rows() -> list[Row]:
    """The lines: backpropagation, checkpointing and our step with a graph, all in bf16 and channels-last."""
    return [row for row in rows() if row.name in ("BP bf16", "BP checkpointing bf16") or row.name.endswith(" graph")]


def run_points(
    found: Sequence[Point], settings: Settings, begin: Callable[[Point], None], done: Callable[[Point, Result], None]
) -> None:
    """Runs them all; told of each before and after. One measured at one place is not measured again at another."""
    seen: dict[tuple[str, int, str], Result] = {}
    for point in found:
        key = point.network, point.batch, point.row.name
        if key not in seen:
            begin(point)
            # On a CPU the peak alone is predicted: a small batch's time would say nothing about the line.
            at_batch = replace(settings, batch=point.batch, timed_batch=point.batch if settings.cuda else 0)
            seen[key] = run_row(point.row, point.network, at_batch)
        done(point, seen[key])


def as_dict(point: Point, result: Result) -> dict[str, Any]:
    peaks = ("predicted_peak_bytes", "predicted_categories", "allocated_peak_bytes", "reserved_peak_bytes")
    wanted = (*peaks, "seconds_per_step", "graphed", "eager_reason", "errors")
    values = result.as_dict()
    place = {"over": point.over, "at": point.at, "network": point.network, "batch": point.batch}
    return {**place, "name": point.row.name, "family": point.row.family, **{key: values[key] for key in wanted}}


def place_of(point: Point) -> tuple[str, int, str]:
    """What tells a point of the figure from the others; in its dictionary the values of "over", "at" and "name"."""
    return point.over, point.at, point.row.name

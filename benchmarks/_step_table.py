"""The tables that ``benchmarks/step.py`` prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from _step_measure import Settings

GB = 1e9


def table(found: Sequence[dict[str, Any]], settings: Settings) -> str:
    """One line per row; a row that failed in some part has a line more for each."""
    base = {row["dtype"]: row for row in found if row["name"] in ("BP", "BP bf16")}
    cells = [(row, columns(row, base.get(row["dtype"]), settings)) for row in found]
    widths = {head: max(len(head), *(len(line[head]) for _, line in cells)) for head in cells[0][1]} if cells else {}
    text = ["  ".join(pad(head, head, widths) for head in widths)]
    text.append("-" * len(text[0]))
    for row, line in cells:
        text.append("  ".join(pad(head, cell, widths) for head, cell in line.items()))
        text += [f"    {part} failed: {error}" for part, error in row["errors"].items()]
        if row["eager_reason"]:
            text.append(f"    no graph: {row['eager_reason']}")
    return "\n".join(line.rstrip() for line in text)


def columns(row: dict[str, Any], base: dict[str, Any] | None, settings: Settings) -> dict[str, str]:
    """The cells of one line by their headings; "of BP": against backpropagation in the same precision."""
    time, counts = row["seconds_per_step"], row["counts"]
    base_time = base and base["seconds_per_step"]
    cells = {"row": row["name"], "adds": row["adds"]}
    if settings.cuda or (settings.timed_batch and settings.seconds):
        cells["ms/step"] = number(time and 1e3 * time["median"])
        cells["20-80 % ms"] = f"{1e3 * time['low']:.1f}-{1e3 * time['high']:.1f}" if time else ""
        cells["images/s"] = f"{row['images_per_second']:.0f}" if time else ""
        cells["time of BP"] = ratio(time and time["median"], base_time and base_time["median"])
    if settings.cuda:
        cells["allocated GB"] = gigabytes(row["allocated_peak_bytes"])
        cells["reserved GB"] = gigabytes(row["reserved_peak_bytes"])
        cells["peak of BP"] = ratio(row["allocated_peak_bytes"], base and base["allocated_peak_bytes"])
        cells["launches"] = str(counts.get("launches", ""))
        cells["host syncs"] = str(counts.get("host_synchronisations", ""))
        return cells
    cells["predicted GB"] = gigabytes(row["predicted_peak_bytes"])
    cells["peak of BP"] = ratio(row["predicted_peak_bytes"], base and base["predicted_peak_bytes"])
    if settings.timed_batch:
        cells["operators"] = str(counts.get("operators", ""))
        cells["host reads"] = str(counts.get("host_reads", ""))
    return cells


def scaling_table(points: Sequence[dict[str, Any]]) -> str:
    """The lines of the figure as numbers: peak GB and, where measured, ms per step."""
    text = []
    for point in points:
        peak = point["allocated_peak_bytes"] or point["predicted_peak_bytes"]
        time = point["seconds_per_step"]
        line = f"{point['over']:<6}{point['at']:>6}  {point['name']:<24}{gigabytes(peak):>9} GB"
        if time:
            line += f"{number(1e3 * time['median']):>9} ms"
        text += [line, *(f"    {part} failed: {error}" for part, error in point["errors"].items())]
    return "\n".join(text)


def number(value: float | None) -> str:
    return "" if not value else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def gigabytes(nbytes: int | None) -> str:
    if not nbytes:
        return ""
    return f"{nbytes / GB:.3f}" if nbytes >= 0.1 * GB else f"{nbytes / GB:.4f}"


def ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}x" if value and base else ""


def pad(head: str, cell: str, widths: dict[str, int]) -> str:
    return f"{cell:<{widths[head]}}" if head in ("row", "adds") else f"{cell:>{widths[head]}}"

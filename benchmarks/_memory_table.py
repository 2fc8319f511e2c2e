"""What came out of a row of ``benchmarks/memory.py``, as a line of its table and as JSON."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from _memory_rows import Row

from auglocal_ext.memory import MemoryReport
from auglocal_ext.memory.meter import ACTIVATIONS, GRADIENTS, Mark

GB = 1e9
ADDED = (GRADIENTS, ACTIVATIONS)  # all else stays in memory between steps


@dataclass
class Result:
    """What came out of one row; on a GPU it failed if nothing was measured."""

    row: Row
    cuda: bool
    dtype: str = "fp32"
    predicted: MemoryReport | None = None
    measured: MemoryReport | None = None
    parameters: int = 0
    deployed: int = 0
    counted: bool = False
    inference_macs: int | None = None
    training_macs: int | None = None
    error: str | None = None
    paper_gb: float | None = None

    @property
    def report(self) -> MemoryReport | None:
        return self.measured if self.cuda else self.predicted

    @property
    def peak_bytes(self) -> int | None:
        return self.report.peak_bytes if self.report else None

    @property
    def step_bytes(self) -> int | None:
        """Of the predicted peak, what does not stay in memory between steps: activations and gradients.

        Gradients of the step before, which a plain loop keeps until it begins, are not counted as staying.
        """
        found = self.predicted and self.predicted.categories
        return sum(found[category] for category in ADDED) if found else None


def columns(result: Result, base: Result | None) -> dict[str, str]:
    """The cells of one line by their headings; GB of 1e9 bytes, costs relative to the BP row."""
    predicted, measured = result.predicted, result.measured
    cells = {"method": result.row.name, "layers": "fused" if result.row.fused else "eager"}
    cells["dtype"] = result.dtype
    cells["recompute"] = "" if result.row.recompute == "none" else result.row.recompute
    if result.cuda:
        cells["allocated GB"] = gigabytes(measured and measured.peak_bytes)
        cells["reserved GB"] = gigabytes(measured and measured.reserved_peak_bytes)
        cells["predicted GB"] = gigabytes(predicted and predicted.peak_bytes)
    else:
        cells["peak GB"] = gigabytes(predicted and predicted.peak_bytes)
    cells["vs BP"] = ratio(result.peak_bytes, base and base.peak_bytes)
    cells["step adds GB"] = gigabytes(result.step_bytes)
    cells["paper GB"] = "" if result.paper_gb is None else f"{result.paper_gb:.2f}"
    cells["trained M"] = f"{result.parameters / 1e6:.2f}"
    cells["deployed M"] = f"{result.deployed / 1e6:.2f}"
    if result.counted:
        cells["inference MMAC"] = millions(result.inference_macs)
        cells["training MMAC"] = millions(result.training_macs)
    base_flops = base.predicted.flops if base and base.predicted else None
    cells["FLOPs vs BP"] = ratio(predicted and predicted.flops, base_flops)
    if result.cuda:
        base_time = base.measured.median_seconds if base and base.measured else None
        times = measured.seconds if measured else ()
        low, median, high = statistics.quantiles(times, n=4) if times else (None, None, None)
        cells["ms/step"] = f"{1e3 * median:.1f}" if times else ""
        cells["IQR ms"] = f"{1e3 * (high - low):.1f}" if times else ""
        cells["time vs BP"] = ratio(median, base_time)
    return cells


def gigabytes(nbytes: int | None) -> str:
    if nbytes is None:
        return ""
    return f"{nbytes / GB:.2f}" if nbytes >= 0.1 * GB else f"{nbytes / GB:.4f}"


def millions(macs: int | None) -> str:
    return "" if macs is None else f"{macs / 1e6:.1f}"


def ratio(value: float | None, base: float | None) -> str:
    return f"{value / base:.2f}x" if value is not None and base else ""


def table(network: str, results: Sequence[Result]) -> str:
    base = next((r for r in results if r.row.name == "BP"), None)
    lines = [columns(result, base) for result in results]
    widths = {head: max(len(head), *(len(line[head]) for line in lines)) for head in lines[0]}
    text = [network, "  ".join(pad(head, head, widths) for head in widths)]
    text.append("-" * len(text[1]))
    for result, line in zip(results, lines, strict=True):
        if result.predicted or result.measured:
            text.append("  ".join(pad(head, cell, widths) for head, cell in line.items()))
        if result.error:
            text.append(f"{pad('method', line['method'], widths)}  failed: {result.error}")
    return "\n".join(line.rstrip() for line in text)


def pad(head: str, cell: str, widths: dict[str, int]) -> str:
    return f"{cell:<{widths[head]}}" if head == "method" else f"{cell:>{widths[head]}}"


def as_json(result: Result) -> dict[str, Any]:
    return {
        "name": result.row.name,
        "family": result.row.family,
        "fused": result.row.fused,
        "recompute": result.row.recompute,
        "dtype": result.dtype,
        "parameters_trained": result.parameters,
        "parameters_deployed": result.deployed,
        "macs_inference": result.inference_macs,
        "macs_training": result.training_macs,
        "paper_gb": result.paper_gb,
        "error": result.error,
        "predicted": result.predicted and result.predicted.as_dict(timeline_points=300),
        "measured": result.measured and result.measured.as_dict(),
    }


def from_json(values: dict[str, Any], row: Row, cuda: bool, counted: bool) -> Result:
    """The result that :func:`as_json` wrote; its timelines are thinned."""
    return Result(
        row,
        cuda,
        values["dtype"],
        predicted=_report(values["predicted"]),
        measured=_report(values["measured"]),
        parameters=values["parameters_trained"],
        deployed=values["parameters_deployed"],
        counted=counted,
        inference_macs=values["macs_inference"],
        training_macs=values["macs_training"],
        error=values["error"],
        paper_gb=values["paper_gb"],
    )


def _report(values: dict[str, Any] | None) -> MemoryReport | None:
    if values is None:
        return None
    plain = {name: value for name, value in values.items() if name != "seconds_median"}
    plain["timeline"] = tuple(map(tuple, plain["timeline"]))
    plain["marks"] = tuple(Mark(**mark) for mark in plain["marks"])
    return MemoryReport(**{**plain, "seconds": tuple(plain["seconds"])})

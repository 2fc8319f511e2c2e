"""Memory of one training step: backpropagation, checkpointing, AugLocal and ContSup, fused and eager, side by side.

    python benchmarks/memory.py                              # ResNet-32 and ResNet-110, batch 1024, fp32
    python benchmarks/memory.py --network resnet34 --rows BP AugLocal --dtype bf16

Without a GPU the peaks are predicted: tensor bytes under fake tensors, no library workspace. With one they
are measured as well, with the allocator's reserved bytes and the time per step, beside ``torch.compile``.
Prints a table; writes a JSON file and a PNG.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _memory_rows import PAPER, PAPER_BATCH, Row, build_step, rows
from _networks import compiling
from tqdm import tqdm

from auglocal_ext import models
from auglocal_ext.cost import count_parameters
from auglocal_ext.memory import MemoryReport, PlotRow, estimate_step, measure_step, plot_memory

GB = 1e9
NETWORKS = ("resnet32", "resnet110")
LOCAL = ("AugLocal", "ContSup")
COLORS = {
    "BP": "#8a94a0",
    "checkpointing": "#e3a857",
    "compile": "#b0a08a",
    "AugLocal": "#d1495b",
    "ContSup": "#2e86ab",
}


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
    error: str | None = None
    paper_gb: float | None = None

    @property
    def report(self) -> MemoryReport | None:
        return self.measured if self.cuda else self.predicted

    @property
    def peak_bytes(self) -> int | None:
        return self.report.peak_bytes if self.report else None


def run_row(row: Row, network: str, batch: int, dtype: str, cuda: bool) -> Result:
    """One row; what goes wrong in it is its result, and the others go on."""
    result = Result(row, cuda, dtype)
    if batch == PAPER_BATCH and dtype == "fp32":
        result.paper_gb = PAPER.get(network, {}).get(row.paper)

    def build() -> tuple[Callable[..., None], Sequence[Any]]:
        step, tracked = build_step(row, network, batch, dtype)
        if not result.parameters:
            result.parameters = count_parameters(tracked[0])
            result.deployed = count_parameters(tracked[0], inference=True)
        return step, tracked

    try:
        if not row.compiled:
            result.predicted = estimate_step(build, flops=True)
        if cuda:
            with compiling(row.compiled, row.budget):
                result.measured = measure_step(build)
    except torch.OutOfMemoryError:
        result.error = "out of memory"
    except Exception as error:
        result.error = " ".join(f"{type(error).__name__}: {error}".split())
    return result


def columns(result: Result, base: Result | None) -> dict[str, str]:
    """The cells of one line by their headings; GB of 1e9 bytes, costs relative to the BP row."""
    predicted, measured = result.predicted, result.measured
    cells = {"method": result.row.name, "BatchNorm": "fused" if result.row.fused else "eager"}
    cells["dtype"] = result.dtype
    cells["recompute"] = "" if result.row.recompute == "none" else result.row.recompute
    if result.cuda:
        cells["allocated GB"] = gigabytes(measured and measured.peak_bytes)
        cells["reserved GB"] = gigabytes(measured and measured.reserved_peak_bytes)
        cells["predicted GB"] = gigabytes(predicted and predicted.peak_bytes)
    else:
        cells["peak GB"] = gigabytes(predicted and predicted.peak_bytes)
    cells["vs BP"] = ratio(result.peak_bytes, base and base.peak_bytes)
    cells["paper GB"] = "" if result.paper_gb is None else f"{result.paper_gb:.2f}"
    cells["trained M"] = f"{result.parameters / 1e6:.2f}"
    cells["deployed M"] = f"{result.deployed / 1e6:.2f}"
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


def draw(path: Path, results: dict[str, list[Result]], batch: int, dtype: str, cuda: bool) -> Path | None:
    """Bars of every row that gave a figure; through one step: BP, checkpointing and one local rule."""
    panels = []
    for network, found in results.items():
        local = [result.row.name for result in found if result.predicted and result.row.family in LOCAL]
        shown = {"BP", "BP checkpointing", "AugLocal d=3" if "AugLocal d=3" in local else "".join(local[:1])}
        drawn = [plot_row(result, result.row.name in shown) for result in found]
        if any(drawn):
            panels.append((network, [row for row in drawn if row]))
    if not panels:
        return None
    source = "bars measured: allocated peak; curves predicted" if cuda else "predicted"
    return plot_memory(
        panels,
        path,
        title="Memory of one training step",
        subtitle=f"batch {batch}, {dtype}, SGD with momentum, one step at the end; {source} "
        "(tensor bytes under fake tensors, no library workspace)",
        other_label="AugLocal paper's reading, workspaces included",
    )


def plot_row(result: Result, emphasis: bool) -> PlotRow | None:
    report = result.report or result.predicted
    if report is None:
        return None
    return PlotRow(
        label=result.row.name if result.report else f"{result.row.name} (failed; predicted)",
        peak_bytes=report.peak_bytes,
        color=COLORS[result.row.family],
        timeline=result.predicted.timeline if result.predicted else (),
        other_bytes=None if result.paper_gb is None else result.paper_gb * GB,
        emphasis=emphasis,
    )


def as_json(result: Result) -> dict[str, Any]:
    return {
        "name": result.row.name,
        "family": result.row.family,
        "fused": result.row.fused,
        "recompute": result.row.recompute,
        "dtype": result.dtype,
        "parameters_trained": result.parameters,
        "parameters_deployed": result.deployed,
        "paper_gb": result.paper_gb,
        "error": result.error,
        "predicted": result.predicted and result.predicted.as_dict(timeline_points=300),
        "measured": result.measured and result.measured.as_dict(),
    }


def compact(text: str) -> str:
    """Lists of numbers on one line each, so that a result file can be read and compared."""
    return re.sub(r"\[[-\d\s.,e+\[\]]*\]", lambda found: re.sub(r"\s+", " ", found[0]), text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--network",
        nargs="+",
        default=NETWORKS,
        choices=models.NAMES,
        metavar="NAME",
        help=", ".join(models.NAMES),
    )
    parser.add_argument("--batch", type=int, default=1024, help="images per step (default 1024)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16: autocast")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="cpu: predict, also beside a GPU"
    )
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only rows whose name contains one of these")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for JSON and PNG")
    options = parser.parse_args(arguments)
    if options.batch < 2:
        parser.error(f"--batch is at least 2 (BatchNorm), got {options.batch}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave it out to predict")
    cuda = options.device != "cpu" and torch.cuda.is_available()
    wanted = [text.lower() for text in options.rows or [""]]
    chosen = [row for row in rows(cuda) if any(text in row.name.lower() for text in wanted)]
    if not chosen:
        parser.error(f"--rows matches none of: {', '.join(row.name for row in rows(cuda))}")

    results: dict[str, list[Result]] = {network: [] for network in options.network}
    kind = "measured" if cuda else "predicted"
    with tqdm(total=len(results) * len(chosen), file=sys.stderr, leave=False, disable=None) as bar:
        for network, found in results.items():
            for row in chosen:
                bar.set_description(f"{network}, {row.name}")
                found.append(run_row(row, network, options.batch, options.dtype, cuda))
                bar.update()

    note = (
        "measured on " + torch.cuda.get_device_name()
        if cuda
        else "predicted, tensor bytes under fake tensors, no library workspace"
    )
    print(f"Memory of one training step, batch {options.batch}, {options.dtype}, SGD with momentum; {note}")
    for network, found in results.items():
        print("\n" + table(network, found))
    stem = options.output / f"memory-{kind}"
    record = {
        "benchmark": "memory",
        "kind": kind,
        "note": note,
        "settings": {
            "batch": options.batch,
            "dtype": options.dtype,
            "optimizer": "SGD momentum 0.9 foreach, one step at the end",
        },
        **environment(),
        "networks": {network: [as_json(result) for result in found] for network, found in results.items()},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    written = [stem.with_suffix(".json")]
    written[0].write_text(compact(json.dumps(record, indent=1)) + "\n")
    picture = draw(stem.with_suffix(".png"), results, options.batch, options.dtype, cuda)
    print("\nwritten: " + ", ".join(str(path) for path in [*written, picture] if path))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Memory of one training step: backpropagation, checkpointing, AugLocal and ContSup, fused and eager, side by side.

    python benchmarks/memory.py                              # ResNet-32 and ResNet-110, batch 1024, fp32
    python benchmarks/memory.py --network resnet34 --rows BP AugLocal --dtype bf16
    python benchmarks/memory.py --rules                      # a row for each learning rule, with its arithmetic

Without a GPU the peaks are predicted: tensor bytes under fake tensors, no library workspace. With one they
are measured as well, with the allocator's reserved bytes and the time per step, beside ``torch.compile``.
Prints a table; writes a JSON file and a PNG.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _memory_rows import PAPER, PAPER_BATCH, Row, build_step, rows
from _memory_table import GB, Result, as_json, table
from _networks import compiling
from _rule_rows import rule_rows
from torch import nn
from tqdm import tqdm

from auglocal_ext import LocalSequential, models
from auglocal_ext.cost import count_macs, count_parameters, count_training_macs
from auglocal_ext.memory import PlotRow, estimate_step, measure_step, plot_memory

NETWORKS = ("resnet32", "resnet110")
RIVALS = ("BP", "checkpointing", "compile")
COLORS = {
    "BP": "#8a94a0",
    "checkpointing": "#e3a857",
    "compile": "#b0a08a",
    "AugLocal": "#d1495b",
    "ContSup": "#2e86ab",
    "Greedy": "#7a9e7e",
    "DGL": "#4f7f5b",
    "PredSim": "#9a6fb0",
    "InfoPro": "#c77d3b",
    "MAN": "#5c6bc0",
    "combination": "#3f4a56",
}


def run_row(row: Row, network: str, batch: int, dtype: str, cuda: bool, macs: bool = False) -> Result:
    """One row, with ``macs`` its multiply-accumulates too; what goes wrong in it is its result, the others go on."""
    result = Result(row, cuda, dtype, counted=macs)
    if batch == PAPER_BATCH and dtype == "fp32":
        result.paper_gb = PAPER.get(network, {}).get(row.paper)

    def build() -> tuple[Callable[..., None], Sequence[Any]]:
        step, tracked = build_step(row, network, batch, dtype)
        if not result.parameters:
            result.parameters = count_parameters(tracked[0])
            result.deployed = count_parameters(tracked[0], inference=True)
            if result.counted:
                count_arithmetic(result, tracked[0], models.input_shape(network))
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


def count_arithmetic(result: Result, net: nn.Module, input_shape: Sequence[int]) -> None:
    """Multiply-accumulates per image of inference and of a training forward; backpropagation's are the same."""
    result.inference_macs = result.training_macs = count_macs(net, input_shape)
    if isinstance(net, LocalSequential):
        result.training_macs = count_training_macs(net, input_shape)


def draw(path: Path, results: dict[str, list[Result]], batch: int, dtype: str, cuda: bool) -> Path | None:
    """Bars of every row that gave a figure; through one step: BP, checkpointing and one local rule."""
    panels = []
    for network, found in results.items():
        local = [result.row.name for result in found if result.predicted and result.row.family not in RIVALS]
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
    parser.add_argument(
        "--rules",
        action="store_true",
        help="a row for each learning rule and for some combinations, in place of the rivals and of AugLocal's depths; "
        "with multiply-accumulates per image of inference and of a training step's forward part",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for JSON and PNG")
    options = parser.parse_args(arguments)
    if options.batch < 2:
        parser.error(f"--batch is at least 2 (BatchNorm), got {options.batch}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave it out to predict")
    cuda = options.device != "cpu" and torch.cuda.is_available()
    wanted = [text.lower() for text in options.rows or [""]]
    known = rule_rows() if options.rules else rows(cuda)
    chosen = [row for row in known if any(text in row.name.lower() for text in wanted)]
    if not chosen:
        parser.error(f"--rows matches none of: {', '.join(row.name for row in known)}")

    results: dict[str, list[Result]] = {network: [] for network in options.network}
    kind = "measured" if cuda else "predicted"
    with tqdm(total=len(results) * len(chosen), file=sys.stderr, leave=False, disable=None) as bar:
        for network, found in results.items():
            for row in chosen:
                bar.set_description(f"{network}, {row.name}")
                found.append(run_row(row, network, options.batch, options.dtype, cuda, macs=options.rules))
                bar.update()

    note = (
        "measured on " + torch.cuda.get_device_name()
        if cuda
        else "predicted, tensor bytes under fake tensors, no library workspace"
    )
    print(f"Memory of one training step, batch {options.batch}, {options.dtype}, SGD with momentum; {note}")
    for network, found in results.items():
        print("\n" + table(network, found))
    stem = options.output / f"{'rules' if options.rules else 'memory'}-{kind}"
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

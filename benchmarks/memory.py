"""Memory of one training step: backpropagation, checkpointing, AugLocal and ContSup, fused and eager, side by side.

    python benchmarks/memory.py                              # ResNet-32 and ResNet-110, batch 1024, fp32
    python benchmarks/memory.py --network resnet34 --rows BP AugLocal --dtype bf16
    python benchmarks/memory.py --network torchvision:mobilenet_v2 --rows BP AugLocal
    python benchmarks/memory.py --rules                      # a row for each learning rule, with its arithmetic
    python benchmarks/memory.py --localized --network torchvision:vit_b_16 --batch 256    # a network as it comes
    python benchmarks/memory.py --network vit-b16 gpt-24x1024    # transformers, bf16, with rows of their own
    python benchmarks/memory.py --limit 500 --resume         # goes on where --limit, or a kill, ended the last command

Without a GPU the peaks are predicted: tensor bytes under fake tensors, no library workspace. With one they
are measured as well, with the allocator's reserved bytes and the time per step, beside ``torch.compile``.
Prints a table; writes a JSON file, row by row, and a PNG.

Exit status: 0 when every row has been tried, 130 if --limit came before the end.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _backbones import BACKBONES
from _environment import environment
from _localized_rows import localized_rows
from _memory_rows import PAPER, PAPER_BATCH, Row, rows
from _memory_table import GB, Result, as_json, from_json, table
from _networks import compiling, input_shape
from _resume import BEGUN, INTERRUPTED, NEVER_ENDED, StartOverError, earlier, is_broken, start_over, write_text
from _rule_rows import rule_rows
from _token_networks import NAMES as TRANSFORMERS
from _token_networks import is_transformer, transformer
from _token_rows import OPTIMIZER, token_rows
from torch import nn
from tqdm import tqdm

from auglocal_ext import LocalSequential, models
from auglocal_ext.cli.network_options import network_name
from auglocal_ext.cost import count_macs, count_parameters, count_training_macs
from auglocal_ext.memory import PlotRow, estimate_step, measure_step, plot_memory

NETWORKS = ("resnet32", "resnet110")
BATCH = 1024
RIVALS = ("BP", "checkpointing", "compile")
DRAWN = ("AugLocal d=3", "Greedy K=4 recompute peak")  # through one step, the first that there is
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
    "SOLO": "#2b7a78",
    "combination": "#3f4a56",
}


def run_row(row: Row, network: str, batch: int, dtype: str, cuda: bool, macs: bool = False) -> Result:
    """One row, with ``macs`` its multiply-accumulates too; what goes wrong in it is its result, the others go on."""
    result = Result(row, cuda, dtype, counted=macs)
    if batch == PAPER_BATCH and dtype == "fp32":
        result.paper_gb = PAPER.get(network, {}).get(row.paper)

    def build() -> tuple[Callable[..., None], Sequence[Any]]:
        step, tracked = row.build_step(network, batch, dtype)
        if not result.parameters:
            result.parameters = count_parameters(tracked[0])
            result.deployed = count_parameters(tracked[0], inference=True)
            if result.counted:
                count_arithmetic(result, tracked[0], input_shape(network))
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


def count_arithmetic(result: Result, net: nn.Module, shape: Sequence[int]) -> None:
    """Multiply-accumulates per image of inference and of a training forward; backpropagation's are the same."""
    result.inference_macs = result.training_macs = count_macs(net, shape)
    if isinstance(net, LocalSequential):
        result.training_macs = count_training_macs(net, shape)


def draw(path: Path, results: dict[str, list[Result]], settings: dict[str, str | int], cuda: bool) -> Path | None:
    """Bars of every row that gave a figure; through one step: BP, checkpointing and one local rule."""
    panels = []
    for network, found in results.items():
        local = [result.row.name for result in found if result.predicted and result.row.family not in RIVALS]
        chosen = next((name for name in DRAWN if name in local), "".join(local[:1]))
        shown = {"BP", "BP checkpointing", chosen}
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
        subtitle=f"batch {settings['batch']}, {settings['dtype']}, {settings['optimizer']}; {source} "
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


class Report:
    """All results so far by network, in one file that is written before and after each row.

    With ``resume`` it begins with those of earlier commands; a row that a process did not survive is one of them.
    """

    def __init__(self, path: Path, head: dict[str, Any], known: Sequence[Row], cuda: bool, counted: bool, resume: bool):
        self.path, self._head = path, head
        self._order = {row.name: place for place, row in enumerate(known)}
        record = (earlier(path, head) if resume else None) or {"networks": {}}
        self.networks: dict[str, list[Result]] = {}
        for network, lines in record["networks"].items():
            by_name = {row.name: row for row in known}
            with_macs = counted or network in BACKBONES
            self.networks[network] = [from_json(line, by_name[line["name"]], cuda, with_macs) for line in lines]
            for result in self.networks[network]:
                result.error = NEVER_ENDED if result.error == BEGUN else result.error

    def has(self, network: str, row: Row) -> bool:
        return any(result.row.name == row.name for result in self.networks.get(network, ()))

    def add(self, network: str, result: Result) -> None:
        found = [other for other in self.networks.get(network, ()) if other.row.name != result.row.name]
        self.networks[network] = sorted([*found, result], key=lambda result: self._order[result.row.name])
        self.write()

    def forget_begun(self) -> None:
        """What was interrupted from outside is measured by the next command."""
        for network, found in self.networks.items():
            self.networks[network] = [result for result in found if result.error != BEGUN]
        self.write()

    def write(self) -> None:
        networks = {network: [as_json(result) for result in found] for network, found in self.networks.items()}
        write_text(self.path, compact(json.dumps({**self._head, "networks": networks}, indent=1)) + "\n")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--network",
        nargs="+",
        default=NETWORKS,
        type=lambda name: name if is_transformer(name) else network_name(name),
        metavar="NAME",
        help=f"{', '.join(models.NAMES)}, torchvision:NAME or timm:NAME; MACs are counted of {', '.join(BACKBONES)}. "
        f"With rows of their own: {TRANSFORMERS}",
    )
    parser.add_argument(
        "--batch", type=int, help=f"images or texts per step (default {BATCH}; of transformers 256 images, 8 texts)"
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "pure-bf16"),
        help="bf16: autocast, the default of transformers (else fp32); pure-bf16: parameters and optimizer state too, "
        "transformers alone",
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="cpu: predict, also beside a GPU"
    )
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only rows whose name contains one of these")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--localized",
        action="store_true",
        help="backpropagation, checkpointing, four balanced modules without recomputation, with all of it and with "
        "what the planner chooses, and Greedy and AugLocal at every cut, in place of the papers' rows",
    )
    chosen.add_argument(
        "--rules",
        action="store_true",
        help="a row for each learning rule and for some combinations, in place of the rivals and of AugLocal's depths; "
        "with multiply-accumulates per image of inference and of a training step's forward part",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="rows that go through torch.compile, which only a GPU has",
    )
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no row is begun")
    parser.add_argument("--resume", action="store_true", help="leave out the rows that the JSON file has already")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for JSON and PNG")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    parser = make_parser()
    options = parser.parse_args(arguments)
    for network in filter(models.is_segmentation, options.network):
        parser.error(f"--network {network}: the rows train classifiers")
    tokens = any(map(is_transformer, options.network))
    if tokens and not all(map(is_transformer, options.network)):
        parser.error(f"--network: transformers have rows of their own, in a command of their own: {TRANSFORMERS}")
    if tokens and (options.localized or options.rules):
        parser.error(f"--{'rules' if options.rules else 'localized'}: transformers have rows of their own")
    options.dtype = options.dtype or ("bf16" if tokens else "fp32")
    if options.dtype == "pure-bf16" and not tokens:
        parser.error(f"--dtype pure-bf16: for transformers alone, {TRANSFORMERS}")
    if options.batch is not None and options.batch < 2:
        parser.error(f"--batch is at least 2 (BatchNorm), got {options.batch}")
    if not tokens:
        options.batch = options.batch or BATCH
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave it out to predict")
    cuda = options.device != "cpu" and torch.cuda.is_available()
    wanted = [text.lower() for text in options.rows or [""]]
    known: Sequence[Row] = rows(cuda)
    if tokens:
        known = token_rows(cuda)
    elif options.localized or options.rules:
        known = localized_rows() if options.localized else rule_rows()
    possible = [row for row in known if options.compile or not row.compiled]
    chosen = [row for row in possible if any(text in row.name.lower() for text in wanted)]
    if not chosen:
        parser.error(f"--rows matches none of: {', '.join(row.name for row in possible)}")

    kind = "measured" if cuda else "predicted"
    note = (
        "measured on " + torch.cuda.get_device_name()
        if cuda
        else "predicted, tensor bytes under fake tensors, no library workspace"
    )
    head = {
        "benchmark": "memory",
        "kind": kind,
        "note": note,
        "settings": settings_of(options, tokens),
        **environment(),
    }
    what = "tokens" if tokens else "localized" if options.localized else "rules" if options.rules else "memory"
    stem = options.output / f"{what}-{kind}"
    report = Report(stem.with_suffix(".json"), head, known, cuda, options.rules, options.resume)
    try:
        finished = run(options, chosen, cuda, report, start + options.limit)
    except StartOverError as error:
        print(f"{error}: the rest in a new process")
        start_over(__file__, sys.argv[1:] if arguments is None else arguments, start + options.limit)
    except KeyboardInterrupt:
        report.forget_begun()
        raise

    settings = head["settings"]
    print(f"Memory of one training step, batch {settings['batch']}, {options.dtype}, {settings['optimizer']}; {note}")
    if tokens and not cuda:
        print("Rows of torch.compile and its memory budget are left out: nothing of compiled code can be predicted.")
    for network, found in report.networks.items():
        print("\n" + table(network, found))
    picture = draw(stem.with_suffix(".png"), report.networks, settings, cuda)
    print("\nwritten: " + ", ".join(str(path) for path in [report.path, picture] if path))
    return 0 if finished else INTERRUPTED


def settings_of(options: argparse.Namespace, tokens: bool) -> dict[str, str | int]:
    batch, optimizer = options.batch, "SGD momentum 0.9 foreach, one step at the end"
    if tokens:
        batches = {network: batch_of(options, network) for network in options.network}
        batch = ", ".join(f"{count} for {network}" for network, count in batches.items())
        optimizer = OPTIMIZER
    return {"batch": batch, "dtype": options.dtype, "optimizer": optimizer}


def batch_of(options: argparse.Namespace, network: str) -> int:
    return transformer(network).batch if options.batch is None else options.batch


def run(options: argparse.Namespace, chosen: Sequence[Row], cuda: bool, report: Report, deadline: float) -> bool:
    """The rows that are not there yet; whether the time was enough."""
    todo = [(network, row) for network in options.network for row in chosen if row.fits(network)]
    with tqdm(total=len(todo), file=sys.stderr, leave=False, disable=None) as bar:
        for network, row in todo:
            bar.set_description(f"{network}, {row.name}")
            if not report.has(network, row):
                if time.monotonic() > deadline:
                    return False
                report.add(network, Result(row, cuda, options.dtype, error=BEGUN))
                macs = options.rules or network in BACKBONES
                report.add(network, run_row(row, network, batch_of(options, network), options.dtype, cuda, macs))
                if is_broken():
                    raise StartOverError(f"CUDA answers no more after {network}, {row.name}")
            bar.update()
    return True


if __name__ == "__main__":
    sys.exit(main())

"""Time and memory of a training step: every idea of ours added in turn, beside every rival, in one run.

    python benchmarks/step.py                                # ResNet-32 and ResNet-110, batch 1024
    python benchmarks/step.py --network resnet34 resnet101 vgg13 --part table
    python benchmarks/step.py --part scaling --depths 20 110 1202

With a GPU everything is measured at --batch. Without one the peaks are predicted at --batch (tensor bytes under fake
tensors, no library workspace), and times, operators and host reads are those of real steps at --cpu-batch: two batches
that no column mixes. A row that fails says so, the others go on. Prints a table; writes a JSON file and a PNG for each
part.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _step_measure import Result, Settings, run_row
from _step_plot import draw_rows, draw_scaling
from _step_rows import LR, MOMENTUM, Row, rows
from _step_scaling import ALL_DEPTHS, BATCHES, DEPTHS, Point, as_dict, points, run_points
from _step_table import scaling_table, table
from tqdm import tqdm

from auglocal_ext import models

NETWORKS = ("resnet32", "resnet110")
PARTS = ("table", "scaling")


class Report:
    """All results so far, a file for each part; written after each result, so that a stopped run leaves what it had."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._head = head(options)
        self._order = [row.name for row in options.chosen]
        self.stem = options.output / f"step-{options.device}"
        self.networks: dict[str, list[dict[str, Any]]] = {}
        if "table" in options.part:
            self.networks = {network: [] for network in options.network}
        self.scaling: list[dict[str, Any]] = []

    def add(self, network: str, result: Result) -> None:
        found = self.networks[network]
        found.append(result.as_dict())
        found.sort(key=lambda row: self._order.index(row["name"]))
        self._write("", {"networks": self.networks})

    def add_point(self, point: Point, result: Result) -> None:
        self.scaling.append(as_dict(point, result))
        self._write("-scaling", {"scaling": self.scaling})

    def draw(self, subtitle: str) -> list[Path]:
        """The pictures, and every file that was written."""
        scaled = "bf16 autocast, channels-last, SGD with momentum; AugLocal with fused layers, an optimizer per module"
        pictures = [
            draw_rows(self._path("", "png"), self.networks, "One training step", subtitle),
            draw_scaling(self._path("-scaling", "png"), self.scaling, "Over depth and batch", scaled),
        ]
        records = [
            self._path(part, "json") for part, found in (("", self.networks), ("-scaling", self.scaling)) if found
        ]
        return [*records, *(picture for picture in pictures if picture)]

    def _write(self, part: str, results: dict[str, Any]) -> None:
        self._path(part, "json").write_text(json.dumps({**self._head, **results}, indent=1) + "\n")

    def _path(self, part: str, kind: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}{part}.{kind}")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--network",
        nargs="+",
        default=list(NETWORKS),
        choices=models.NAMES,
        metavar="NAME",
        help=f"{', '.join(models.NAMES)}; default {' '.join(NETWORKS)}",
    )
    parser.add_argument("--batch", type=int, default=1024, help="images per step of the peaks; on a GPU of all")
    parser.add_argument("--cpu-batch", type=int, default=8, help="images per timed step on a CPU; 0 predicts alone")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="cpu: also beside a GPU")
    parser.add_argument("--rows", nargs="+", metavar="TEXT", help="only rows whose name contains one of these")
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="the rows, the scaling figure")
    parser.add_argument("--depths", nargs="+", type=int, metavar="N", help=f"of the figure; {ALL_DEPTHS} is the range")
    parser.add_argument("--batches", nargs="+", type=int, metavar="N", help="of the figure")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="rows that go through torch.compile; the default on a GPU, where they run last",
    )
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="timed steps of a row: 3 to 50 of them; 0 on a CPU: no times"
    )
    parser.add_argument("--row-limit", type=float, help="seconds after which a row is given up; default on a GPU 120")
    parser.add_argument("--limit", type=float, help="seconds after which no row is begun; default on a GPU 540")
    parser.add_argument("--quick", action="store_true", help="three timed steps a row, two points a line")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for JSON and PNG")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Checked options with the defaults of the device; ``chosen`` holds the rows."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    check(parser, options)
    options.device = "cuda" if options.device != "cpu" and torch.cuda.is_available() else "cpu"
    cuda = options.device == "cuda"
    options.compile = cuda if options.compile is None else options.compile
    options.limit = options.limit or (540.0 if cuda else math.inf)
    options.row_limit = options.row_limit or (120.0 if cuda else math.inf)
    options.depths = options.depths or DEPTHS[options.device]
    options.batches = options.batches or BATCHES[options.device]
    if options.quick:
        options.seconds = min(options.seconds, 1e-3)
        options.depths, options.batches = sorted(options.depths)[:2], sorted(options.batches)[:2]
    wanted = [text.lower() for text in options.rows or [""]]
    possible = [row for row in rows() if (options.compile or not row.compiled) and (cuda or not row.cuda_only)]
    options.chosen = [row for row in possible if any(text in row.name.lower() for text in wanted)]
    if not options.chosen:
        parser.error(f"--rows matches none of: {', '.join(row.name for row in possible)}")
    return options


def check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    for name, least in (("batch", 2), ("cpu_batch", 0)):
        if getattr(options, name) < least or getattr(options, name) == 1:
            parser.error(f"--{name.replace('_', '-')} is at least 2 (BatchNorm), got {getattr(options, name)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device; leave it out to predict")
    if any(depth < 20 or depth % 6 != 2 for depth in options.depths or ()):
        parser.error(f"--depths: a CIFAR ResNet has depth 6n + 2, 20 or more here, got {options.depths}")
    if any(batch < 2 for batch in options.batches or ()):
        parser.error(f"--batches: at least 2 (BatchNorm), got {options.batches}")


def head(options: argparse.Namespace) -> dict[str, Any]:
    """What a result file says before its numbers."""
    cuda = options.device == "cuda"
    timed = options.batch if cuda else options.cpu_batch
    return {
        "benchmark": "step",
        "device": options.device,
        "note": note(options),
        "settings": {
            "batch": options.batch,
            "timed_batch": timed,
            "seconds_per_row": options.seconds,
            "row_limit": options.row_limit if options.row_limit < math.inf else None,
            "compiled_rows": options.compile,
            "optimizer": f"SGD, lr {LR}, momentum {MOMENTUM}; foreach, but LocalStep's as it chooses",
            "cudnn_benchmark": torch.backends.cudnn.benchmark,
            "tf32_convolutions": torch.backends.cudnn.allow_tf32,
            "threads": torch.get_num_threads(),
            "load_average": os.getloadavg()[0],  # times compare between rows on an idle machine only
        },
        **environment(),
    }


def note(options: argparse.Namespace) -> str:
    if options.device == "cuda":
        return (
            f"measured on {torch.cuda.get_device_name()} at batch {options.batch}; peaks as allocated, library "
            "workspaces included; of a captured step that of its warm-up and capture"
        )
    text = f"peaks predicted at batch {options.batch}: tensor bytes under fake tensors, no library workspace"
    if not options.cpu_batch:
        return text
    what = "times, operators and host reads" if options.seconds else "operators and host reads"
    return (
        f"{text}; {what} of real steps on the CPU at batch {options.cpu_batch}, where checking labels reads the host "
        "by design (on CUDA it does not wait)"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    cuda = options.device == "cuda"
    settings = Settings(
        device=options.device,
        batch=options.batch,
        timed_batch=options.batch if cuda else options.cpu_batch,
        seconds=options.seconds,
        row_limit=options.row_limit,
        deadline=time.monotonic() + options.limit,
    )
    options.output.mkdir(parents=True, exist_ok=True)
    report = Report(options)
    run(options, settings, report)

    print(f"A training step, {note(options)}")
    for network, found in report.networks.items():
        print(f"\n{network}\n{table(found, settings)}")
    if report.scaling:
        print(f"\nscaling\n{scaling_table(report.scaling)}")
    print("\nwritten: " + ", ".join(str(path) for path in report.draw(subtitle(settings))))
    return 0


def run(options: argparse.Namespace, settings: Settings, report: Report) -> None:
    """The rows of all networks, then the scaling figure, then what has to be compiled, which takes longest."""
    plain = [row for row in options.chosen if not row.compiled]
    compiled = [row for row in options.chosen if row.compiled]
    figure = points(options.batch, options.depths, options.batches) if "scaling" in options.part else []
    total = len(report.networks) * len(options.chosen) + len(figure)
    with tqdm(total=total, file=sys.stderr, leave=False, disable=None) as bar:
        run_table(plain, settings, report, bar)
        run_points(figure, settings, advance(bar, report.add_point))
        run_table(compiled, settings, report, bar)


def run_table(chosen: Sequence[Row], settings: Settings, report: Report, bar: tqdm) -> None:
    for network in report.networks:
        for row in chosen:
            bar.set_description(f"{network}, {row.name}")
            report.add(network, run_row(row, network, settings))
            bar.update()


def advance(bar: tqdm, add: Callable[[Point, Result], None]) -> Callable[[Point, Result], None]:
    def done(point: Point, result: Result) -> None:
        bar.set_description(f"{point.network}, batch {point.batch}, {point.row.name}")
        add(point, result)
        bar.update()

    return done


def subtitle(settings: Settings) -> str:
    if settings.cuda:
        return f"batch {settings.batch}, SGD with momentum; measured on {torch.cuda.get_device_name()}"
    real = f"; left: real steps on a CPU at batch {settings.timed_batch}" if settings.timed_batch else ""
    return f"SGD with momentum; peaks predicted at batch {settings.batch}{real}"


if __name__ == "__main__":
    sys.exit(main())

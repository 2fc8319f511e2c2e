"""Time and memory of a training step: every idea of ours added in turn, beside every rival, in one run.

    python benchmarks/step.py                                # ResNet-32 and ResNet-110, batch 1024
    python benchmarks/step.py --network resnet34 resnet101 vgg13 --part table
    python benchmarks/step.py --part scaling --depths 20 110 1202
    python benchmarks/step.py --limit 500 --resume           # goes on where --limit, or a kill, ended the last command

With a GPU everything is measured at --batch. Without one the peaks are predicted at --batch (tensor bytes under fake
tensors, no library workspace), and times, operators and host reads are those of real steps at --cpu-batch: two batches
that no column mixes. A row that fails says so, the others go on. Prints a table; writes a JSON file and a PNG for each
part.

Exit status: 0 when every row has been tried, 130 if --limit came before the end.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _resume import (
    BEGUN,
    INTERRUPTED,
    LEFT_OUT,
    NEVER_ENDED,
    StartOverError,
    earlier,
    is_broken,
    start_over,
    write_json,
)
from _step_measure import Result, Settings, run_row
from _step_plot import draw_rows, draw_scaling
from _step_rows import LR, MOMENTUM, Row, rows
from _step_scaling import ALL_DEPTHS, BATCHES, DEPTHS, Point, as_dict, place_of, points, run_points
from _step_table import scaling_table, table
from tqdm import tqdm

from auglocal_ext import models

NETWORKS = ("resnet32", "resnet110")
PARTS = ("table", "scaling")


class Report:
    """All results so far, a file for each part; written before and after each row, so a killed run leaves them.

    With ``--resume`` it begins with those of earlier commands. What a process did not survive counts as a result:
    another would not survive it either.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._head = head(options)
        self._order = {row.name: place for place, row in enumerate(rows())}
        self.stem = options.output / f"step-{options.device}"
        self.networks: dict[str, list[dict[str, Any]]] = {}
        if "table" in options.part:
            self.networks = {network: [] for network in options.network}
        self.scaling: list[dict[str, Any]] = []
        if options.resume:
            if "table" in options.part:
                table = earlier(self._path("", "json"), self._head) or {"networks": {}}
                self.networks |= {network: kept(rows) for network, rows in table["networks"].items()}
            if "scaling" in options.part:
                self.scaling = kept((earlier(self._path("-scaling", "json"), self._head) or {"scaling": ()})["scaling"])

    def has(self, network: str, row: Row) -> bool:
        return any(found["name"] == row.name for found in self.networks[network])

    def begin(self, network: str, row: Row) -> None:
        self.add(network, Result(row, errors={"step": BEGUN}))

    def add(self, network: str, result: Result) -> None:
        found = [row for row in self.networks[network] if row["name"] != result.row.name]
        found.append(result.as_dict())
        found.sort(key=lambda row: self._order[row["name"]])
        self.networks[network] = found
        self._write("", {"networks": self.networks})

    def has_point(self, point: Point) -> bool:
        return any((found["over"], found["at"], found["name"]) == place_of(point) for found in self.scaling)

    def begin_point(self, point: Point) -> None:
        self.add_point(point, Result(point.row, errors={"step": BEGUN}))

    def add_point(self, point: Point, result: Result) -> None:
        place = place_of(point)
        self.scaling = [found for found in self.scaling if (found["over"], found["at"], found["name"]) != place]
        self.scaling.append(as_dict(point, result))
        self._write("-scaling", {"scaling": self.scaling})

    def forget_begun(self) -> None:
        """What was interrupted from outside is measured by the next command."""
        for network, found in self.networks.items():
            self.networks[network] = [row for row in found if row["errors"].get("step") != BEGUN]
            self._write("", {"networks": self.networks})
        if self.scaling:
            self.scaling = [point for point in self.scaling if point["errors"].get("step") != BEGUN]
            self._write("-scaling", {"scaling": self.scaling})

    @property
    def finished(self) -> bool:
        """Whether nothing was left out for lack of time."""
        rows = [*self.scaling, *(row for found in self.networks.values() for row in found)]
        return all(row["errors"].get("step") != LEFT_OUT for row in rows)

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
        write_json(self._path(part, "json"), {**self._head, **results})

    def _path(self, part: str, kind: str) -> Path:
        return self.stem.with_name(f"{self.stem.name}{part}.{kind}")


def kept(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of an earlier command that stand; one that never ended gets its error."""
    found = [row for row in rows if row["errors"].get("step") != LEFT_OUT]
    for row in found:
        if row["errors"].get("step") == BEGUN:
            row["errors"]["step"] = NEVER_ENDED
    return found


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
    parser.add_argument("--resume", action="store_true", help="leave out the rows that the JSON files have already")
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
    try:
        run(options, settings, report)
    except StartOverError as error:
        print(f"{error}: the rest in a new process")
        start_over(__file__, sys.argv[1:] if arguments is None else arguments, settings.deadline)
    except KeyboardInterrupt:
        report.forget_begun()
        raise

    print(f"A training step, {note(options)}")
    for network, found in report.networks.items():
        print(f"\n{network}\n{table(found, settings)}")
    if report.scaling:
        print(f"\nscaling\n{scaling_table(report.scaling)}")
    print("\nwritten: " + ", ".join(str(path) for path in report.draw(subtitle(settings))))
    return 0 if report.finished else INTERRUPTED


def run(options: argparse.Namespace, settings: Settings, report: Report) -> None:
    """The rows of all networks, then the scaling figure, then what has to be compiled, which takes longest."""
    plain = [row for row in options.chosen if not row.compiled]
    compiled = [row for row in options.chosen if row.compiled]
    figure = points(options.batch, options.depths, options.batches) if "scaling" in options.part else []
    figure = [point for point in figure if not report.has_point(point)]
    networks = options.network if "table" in options.part else []
    total = len(networks) * len(options.chosen) + len(figure)
    with tqdm(total=total, file=sys.stderr, leave=False, disable=None) as bar:
        run_table(networks, plain, settings, report, bar)
        run_points(figure, settings, *told(bar, report))
        run_table(networks, compiled, settings, report, bar)


def run_table(networks: Sequence[str], chosen: Sequence[Row], settings: Settings, report: Report, bar: tqdm) -> None:
    for network in networks:
        for row in chosen:
            bar.set_description(f"{network}, {row.name}")
            if not report.has(network, row):
                report.begin(network, row)
                report.add(network, run_row(row, network, settings))
                check_device(f"{network}, {row.name}")
            bar.update()


def told(bar: tqdm, report: Report) -> tuple[Callable[[Point], None], Callable[[Point, Result], None]]:
    def begin(point: Point) -> None:
        bar.set_description(f"{point.network}, batch {point.batch}, {point.row.name}")
        report.begin_point(point)

    def done(point: Point, result: Result) -> None:
        report.add_point(point, result)
        check_device(f"{point.network}, batch {point.batch}, {point.row.name}")
        bar.update()

    return begin, done


def check_device(after: str) -> None:
    if is_broken():
        raise StartOverError(f"CUDA answers no more after {after}")


def subtitle(settings: Settings) -> str:
    if settings.cuda:
        return f"batch {settings.batch}, SGD with momentum; measured on {torch.cuda.get_device_name()}"
    real = f"; left: real steps on a CPU at batch {settings.timed_batch}" if settings.timed_batch else ""
    return f"SGD with momentum; peaks predicted at batch {settings.batch}{real}"


if __name__ == "__main__":
    sys.exit(main())

"""Test accuracy of every learning rule beside backpropagation, on real images, and beside the papers' figures.

    python benchmarks/accuracy.py --data DIR                          # see --epochs, --settings: they follow the device
    python benchmarks/accuracy.py --data DIR --network resnet110 --rows BP "AugLocal d=2" "AugLocal d=6" --seeds 1 2 3
    python benchmarks/accuracy.py --report-only                       # table and figure of the runs that are there

DIR is what `python -m auglocal_ext train --data` takes; each run is one such command, in a folder of its own below
--output. The same command again leaves out the runs that are done and takes up those that were stopped, so Ctrl-C and
--time-limit cost nothing. A run that fails is a line in the table and does not end the others; it is tried again by the
next command. Writes accuracy.json, accuracy.md and accuracy.png about all runs below --output.

Exit status: 0 when all runs are done, 1 if one failed, 130 if it was stopped before.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _environment  # first: it makes the package importable
import torch
from _accuracy_plot import draw
from _accuracy_rows import ROWS, check_settings, row_options, why_not
from _accuracy_runs import INTERRUPTED, OtherRunError, Run, file_name, run_all, status_of
from _accuracy_table import collect, group
from _accuracy_text import describe

from auglocal_ext import models
from auglocal_ext.training import TrainingError
from auglocal_ext.training.config.train_config import pick_device
from auglocal_ext.training.data.datasets import detect
from auglocal_ext.training.data.folder import list_folder


@dataclass(frozen=True)
class Defaults:
    """What is trained where nothing is said."""

    network: str
    epochs: int
    settings: str


# On CUDA the recipe of the data set (CIFAR-10: batch 1024, lr 0.8); on a CPU what shows an order in minutes.
DEFAULTS = {
    "cuda": Defaults("resnet32", 400, "--amp bf16 --channels-last"),
    "cpu": Defaults(
        "resnet8",
        10,
        "--width 8 --train-images 5000 --batch-size 64 --lr 0.1 --channels-last --schedule published",
    ),
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda, cpu = DEFAULTS["cuda"], DEFAULTS["cpu"]
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="an image folder, or torchvision's CIFAR-10, SVHN or STL-10 files")
    add(
        "--network",
        nargs="+",
        choices=models.NAMES,
        metavar="NAME",
        help=f"{', '.join(models.NAMES)}; default {cuda.network} on CUDA, {cpu.network} on a CPU",
    )
    add("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
    add("--seeds", nargs="+", type=int, default=[1234], metavar="N", help="all rows with the first one, then the next")
    add("--epochs", type=int, metavar="N", help=f"default {cuda.epochs} on CUDA, {cpu.epochs} on a CPU")
    add(
        "--settings",
        metavar="OPTIONS",
        help="options of train for every run, as one text, in the place of the default: "
        f"{cuda.settings!r} on CUDA, {cpu.settings!r} on a CPU",
    )
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda, cuda:1, ...")
    add("--jobs", type=int, default=1, metavar="N", help="runs at a time; their times then do not compare")
    add("--time-limit", type=float, metavar="MINUTES", help="stop then, as Ctrl-C does")
    add("--output", type=Path, default=Path("runs/benchmarks/accuracy"), metavar="DIR")
    add("--report-only", action="store_true", help="train nothing: write the report of the runs below --output")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Checked options with the defaults of the device."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    for name, least in (("epochs", 1), ("jobs", 1), ("time_limit", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} is at least {least}, got {value}")
    if options.report_only:
        return options
    if options.data is None:
        parser.error("--data DIR is missing: the folder with the images")
    try:
        options.device = str(pick_device(options.device))
        defaults = DEFAULTS[options.device.partition(":")[0]]
        options.network = options.network or [defaults.network]
        options.epochs = options.epochs or defaults.epochs
        options.settings = defaults.settings if options.settings is None else options.settings
        check_settings(options.settings)
        options.runs = make_runs(options)
    except (TrainingError, OtherRunError) as error:
        parser.error(str(error))
    return options


def make_runs(options: argparse.Namespace) -> list[Run]:
    """Seeds outermost, so that an early end leaves whole tables; without rows that a network is too shallow for."""
    data = data_facts(options.data)
    left_out = {
        (network, row): reason
        for network in options.network
        for row in options.rows
        if (reason := why_not(row, network, options.settings))
    }
    for (network, row), reason in left_out.items():
        print(f"{row} is left out for {network}: {reason.partition(';')[0]}")
    runs = [
        Run(
            network=network,
            row=row,
            epochs=options.epochs,
            seed=seed,
            settings=options.settings,
            rule=row_options(row, network),
            device=options.device,
            data=data,
            folder=options.output / "runs" / f"{network}-{file_name(row)}-{options.epochs}ep-seed{seed}",
        )
        for seed in dict.fromkeys(options.seeds)
        for network in dict.fromkeys(options.network)
        for row in dict.fromkeys(options.rows)
        if (network, row) not in left_out
    ]
    for run in runs:
        status_of(run)
    return runs


def data_facts(root: Path) -> dict[str, Any]:
    """What tells one data set from another wherever it lies; DataError if there is none."""
    kind = detect(root)
    if kind != "folder":
        return {"dataset": kind}
    classes, train, test = list_folder(root)
    return {"dataset": kind, "classes": classes, "train_files": len(train.paths), "test_files": len(test.paths)}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not options.report_only:
        make(options)
    runs = collect(options.output / "runs")
    if not runs:
        print(f"no runs below {options.output / 'runs'}: nothing to report", file=sys.stderr)
        return 1
    print("\n" + report(runs, options.output))
    if options.report_only:
        return 0
    statuses = [status_of(run) for run in options.runs]
    if any(status not in ("done", "failed") for status in statuses):
        again = shlex.join(
            [Path(sys.executable).name, *sys.argv[:1], *(sys.argv[1:] if arguments is None else arguments)]
        )
        print(f"{statuses.count('done')} of {len(statuses)} runs are done; go on with: {again}", file=sys.stderr)
    failed = [run for run, status in zip(options.runs, statuses, strict=True) if status == "failed"]
    for run in failed:
        print(f"failed: {run.name}; see {run.folder}", file=sys.stderr)
    return 1 if failed else 0 if set(statuses) == {"done"} else INTERRUPTED


def make(options: argparse.Namespace) -> None:
    """The runs that are not done yet; the record is written after each."""
    runs = [run for run in options.runs if status_of(run) != "done"]
    total = len(options.runs)
    if len(runs) < total:
        print(f"{total - len(runs)} of {total} runs are done already")

    def after(run: Run, status: str) -> None:
        found = collect(options.output / "runs")
        write_record(found, options.output)
        (record,) = [record for record in found if _is(record, run)]
        print(f"{run.name}: {outcome(record)}", flush=True)

    seconds = math.inf if options.time_limit is None else 60 * options.time_limit
    run_all(runs, options.data, jobs=options.jobs, seconds=seconds, after=after)


def _is(record: dict[str, Any], run: Run) -> bool:
    return all(record[name] == getattr(run, name) for name in ("network", "row", "epochs", "seed"))


def outcome(record: dict[str, Any]) -> str:
    if record["status"] == "failed":
        return f"failed: {record['error']}"
    if record["status"] != "done":
        return f"stopped after {record['epochs_done']} of {record['epochs']} epochs"
    last, best = 100 * record["last_test_accuracy"], 100 * record["best_test_accuracy"]
    return (
        f"last {last:.2f} %, best {best:.2f} % (epoch {record['best_epoch']}); {record['train_seconds']:,.0f} s of "
        f"training, {record['wall_seconds']:,.0f} s in all"
    )


def write_record(runs: Sequence[dict[str, Any]], output: Path) -> list[dict[str, Any]]:
    """accuracy.json; the tables in it."""
    tables = group(runs)
    record = {
        "benchmark": "accuracy",
        **_environment.environment(),
        "load_average": os.getloadavg()[0],
        "threads": torch.get_num_threads(),
        "tables": tables,
        "runs": runs,
    }
    temporary = output / "accuracy.json.partial"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, output / "accuracy.json")
    return tables


def report(runs: Sequence[dict[str, Any]], output: Path) -> str:
    """All three files; the text to print."""
    tables = write_record(runs, output)
    text = describe(tables)
    (output / "accuracy.md").write_text("# Test accuracy\n\n" + text)
    written = [output / "accuracy.json", output / "accuracy.md"]
    if picture := draw(output / "accuracy.png", tables, runs):
        written.append(picture)
    return f"{text}\nwritten: {', '.join(map(str, written))}"


if __name__ == "__main__":
    sys.exit(main())

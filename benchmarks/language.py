"""Bits per byte of small language models: backpropagation, greedy, AugLocal d = 2, and SOLO with each readout, K = 2.

    python benchmarks/language.py --data book.txt                     # six runs, see --epochs and --settings
    python benchmarks/language.py --data book.txt --bytes 1000000 --seeds 1 2
    python benchmarks/language.py --data book.txt --quick             # a minute: does all of it run
    python benchmarks/language.py --report-only                       # table and figure of the runs that are there

Each run is one `python -m auglocal_ext train`, in a folder of its own below --output, on the bytes of the text. The
same command again leaves out the runs that are done and takes up those that were stopped, so Ctrl-C and --time-limit
cost nothing. Writes language.json, language.md, language.png and samples.md about all runs below --output.

Exit status: 0 when all runs are done, 1 if one failed, 130 if it was stopped before.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _environment  # first: it makes the package importable
import torch
from _accuracy_rows import check_settings
from _accuracy_runs import INTERRUPTED, OtherRunError, Run, file_name, run_all, status_of
from _language_report import collect, describe, draw, rows_of, samples

from auglocal_ext.training import TrainingError
from auglocal_ext.training.config.train_config import pick_device

NETWORK, MODULES = "gpt", 2

_LOCAL = f"--modules {MODULES}"
ROWS = {
    "BP": "--rule bp",
    "Greedy": f"--rule greedy {_LOCAL}",
    "AugLocal d=2": f"--rule auglocal --depth 2 {_LOCAL}",
    "SOLO shared": f"--rule solo --readout shared {_LOCAL}",
    "SOLO private": f"--rule solo --readout private {_LOCAL}",
    "SOLO random": f"--rule solo --readout random {_LOCAL}",
}

SETTINGS = "--layers 4 --width 128 --heads 4 --context 128 --batch-size 16 --lr 0.003"
EPOCHS = 2

QUICK = "--layers 4 --width 16 --heads 2 --context 16 --batch-size 16 --sample 20"
QUICK_BYTES = 20_000


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, metavar="FILE", help="a text")
    add("--bytes", type=int, metavar="N", help="of its beginning (default: all)")
    add("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), metavar="ROW", help=f"of {', '.join(ROWS)}")
    add("--seeds", nargs="+", type=int, default=[1], metavar="N", help="all rows with the first one, then the next")
    add("--epochs", type=int, metavar="N", help=f"default {EPOCHS}")
    add("--settings", metavar="OPTIONS", help=f"of train for every run (default {SETTINGS!r})")
    add("--quick", action="store_true", help="an epoch of a tiny network on the first 20,000 bytes; no result")
    add("--device", default="cpu", metavar="NAME", help="cpu (default), auto, cuda, cuda:1, ...")
    add("--time-limit", type=float, default=math.inf, metavar="MINUTES", help="stop then, as Ctrl-C does")
    add("--output", type=Path, default=Path("runs/benchmarks/language"), metavar="DIR")
    add("--report-only", action="store_true", help="train nothing: write the report of the runs below --output")
    return parser


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Checked options, with ``runs``."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.report_only:
        return options
    if options.data is None:
        parser.error("--data FILE is missing: a text")
    if not options.data.is_file():
        parser.error(f"--data {options.data}: no such file; expected a text")
    if options.quick:
        if (options.settings, options.epochs, options.bytes) != (None, None, None):
            parser.error(f"--quick is --settings {QUICK!r} --epochs 1 --bytes {QUICK_BYTES}: leave it or yours out")
        options.settings, options.epochs, options.bytes = QUICK, 1, QUICK_BYTES
    options.settings = SETTINGS if options.settings is None else options.settings
    options.epochs = EPOCHS if options.epochs is None else options.epochs
    if options.epochs < 1 or (options.bytes is not None and options.bytes < 1):
        parser.error("--epochs and --bytes are at least 1")
    try:
        options.device = str(pick_device(options.device))
        check_settings(options.settings)
        options.runs = make_runs(options)
    except (TrainingError, OtherRunError) as error:
        parser.error(str(error))
    return options


def make_runs(options: argparse.Namespace) -> list[Run]:
    """Seeds outermost, so that an early end leaves whole tables."""
    text = options.data.read_bytes()[: options.bytes]
    data = {"name": options.data.name, "bytes": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    runs = [
        Run(
            network=NETWORK,
            row=row,
            epochs=options.epochs,
            seed=seed,
            settings=options.settings,
            rule=ROWS[row],
            device=options.device,
            data=data,
            folder=options.output / "runs" / f"{file_name(row)}-seed{seed}",
        )
        for seed in dict.fromkeys(options.seeds)
        for row in dict.fromkeys(options.rows)
    ]
    for run in runs:
        status_of(run)
    options.output.mkdir(parents=True, exist_ok=True)
    options.text = options.output / "text.txt"
    options.text.write_bytes(text)  # after the runs were checked, whose text it would replace
    return runs


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not options.report_only:
        make(options)
    runs = collect(options.output / "runs", list(ROWS))
    if not runs:
        print(f"no runs below {options.output / 'runs'}: nothing to report", file=sys.stderr)
        return 1
    print("\n" + report(runs, options.output))
    if options.report_only:
        return 0
    statuses = [status_of(run) for run in options.runs]
    for run, status in zip(options.runs, statuses, strict=True):
        if status != "done":
            print(f"{status}: {run.name}; see {run.folder}", file=sys.stderr)
    return 1 if "failed" in statuses else 0 if set(statuses) == {"done"} else INTERRUPTED


def make(options: argparse.Namespace) -> None:
    """The runs that are not done yet."""
    runs = [run for run in options.runs if status_of(run) != "done"]

    def after(run: Run, status: str) -> None:
        print(f"{run.name}: {status}", flush=True)

    run_all(runs, options.text, jobs=1, seconds=60 * options.time_limit, after=after)


def report(runs: Sequence[dict[str, Any]], output: Path) -> str:
    """All files; the text to print."""
    rows = rows_of(runs)
    record = {
        "benchmark": "language",
        **_environment.environment(),
        "threads": torch.get_num_threads(),
        "rows": rows,
        "runs": runs,
    }
    temporary = output / "language.json.partial"
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(temporary, output / "language.json")
    text = describe(rows, runs)
    (output / "language.md").write_text(f"# Language models\n\n{text}\n")
    (output / "samples.md").write_text(samples(runs), encoding="utf-8")
    draw(output / "language.png", runs)
    return f"{text}\n\nwritten: language.json, language.md, language.png and samples.md in {output}"


if __name__ == "__main__":
    sys.exit(main())

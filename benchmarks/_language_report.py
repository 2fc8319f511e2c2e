"""What the runs of ``benchmarks/language.py`` come to: a record of each, the table, the picture and the samples."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _accuracy_runs import OUTPUT, read_state
from _accuracy_table import spread
from _accuracy_text import NONE, difference

from auglocal_ext import pictures as style

#: Perplexities of an ablation at 40 M parameters with auxiliary networks of two blocks (SOLO, arXiv 2609.35440).
PAPER = {"BP": 67.08, "SOLO shared": 70.62, "SOLO private": 75.34, "SOLO random": 98.88}

LINES = {
    "BP": ("#000000", "-"),
    "Greedy": ("#8a8f96", "-"),
    "AugLocal d=2": ("#d6503f", "-"),
    "SOLO shared": ("#084594", "-"),
    "SOLO private": ("#4292c6", "--"),
    "SOLO random": ("#9ecae1", ":"),
}

_TRAINED = re.compile(r"([\d,]+) parameters trained, ([\d,]+) deployed")


def collect(folder: Path, order: Sequence[str]) -> list[dict[str, Any]]:
    """A record of every run below ``folder``: rows in ``order``, then seeds."""
    found = [record for path in folder.glob("*") if (record := _record(path)) is not None]
    return sorted(found, key=lambda run: (order.index(run["row"]), run["seed"]))


def _record(folder: Path) -> dict[str, Any] | None:
    state = read_state(folder)
    if state is None:
        return None
    record = {name: state[name] for name in ("row", "epochs", "seed", "settings", "device", "data", "status", "error")}
    record["command"] = f"python -m auglocal_ext train --data TEXT --output OUTPUT {state['options']}"
    record["sittings"] = state["sittings"]
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = (folder / "log.csv").read_text().splitlines()
        said = " ".join((folder / OUTPUT).read_text().split())
    except FileNotFoundError:
        return {**record, "log": [], "bits": [], "sample": None}
    trained, deployed = (int(number.replace(",", "")) for number in _found(_TRAINED, said))
    return {
        **record,
        "train_tokens": config["data"]["train_tokens"],
        "test_tokens": config["data"]["test_tokens"],
        "local_modules": config["data"]["local_modules"],
        "parameters_trained": trained,
        "parameters_deployed": deployed,
        "threads": config["threads"],
        "versions": config["versions"],
        "bits": [float(epoch["test_bits_per_byte"]) for epoch in csv.DictReader(lines)],
        "log": lines,
        "sample": _last_sample(folder / "samples.txt"),
    }


def _found(pattern: re.Pattern[str], text: str) -> tuple[str, ...]:
    match = pattern.search(text)
    if match is None:
        raise ValueError(f"train's output has no {pattern.pattern!r}")
    return match.groups()


def _last_sample(path: Path) -> str | None:
    if not path.exists():
        return None
    return re.split(r"^=== epoch \d+ ===\n", path.read_text(encoding="utf-8"), flags=re.M)[-1].strip("\n")


def rows_of(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds that are done: bits per byte after the last epoch, and what they lie above BP's.

    ``excess`` is the loss in percent of BP's of the same seeds, ``paper_excess`` that of the paper's log-perplexities.
    """
    done = [run for run in runs if run["status"] == "done"]
    bp = {run["seed"]: run["bits"][-1] for run in done if run["row"] == "BP"}
    rows = []
    for name in dict.fromkeys(run["row"] for run in done):
        own = [run for run in done if run["row"] == name]
        pairs = [(run["bits"][-1], bp[run["seed"]]) for run in own if run["seed"] in bp and name != "BP"]
        rows.append(
            {
                "row": name,
                "seeds": [run["seed"] for run in own],
                "local_modules": own[0]["local_modules"],
                "parameters_trained": own[0]["parameters_trained"],
                "bits": spread([run["bits"][-1] for run in own]),
                "difference": spread([bits - base for bits, base in pairs]),
                "excess": spread([100 * (bits / base - 1) for bits, base in pairs]),
                "paper": PAPER.get(name),
                "paper_excess": None if name == "BP" or name not in PAPER else 100 * (_nats(name) / _nats("BP") - 1),
            }
        )
    return rows


def _nats(row: str) -> float:
    return math.log(PAPER[row])


def describe(rows: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> str:
    """The table, and what has to be said of it, as Markdown."""
    notes = [f"{run['row']}, seed {run['seed']}: {_why(run)}" for run in runs if run["status"] != "done"]
    return "\n\n".join(
        [_conditions(runs), table(rows), *([] if not notes else ["\n".join(f"- {note}" for note in notes)])]
    )


def _conditions(runs: Sequence[dict[str, Any]]) -> str:
    """What all runs have in common, each that differs."""
    parts = []
    for data, epochs, settings, device in dict.fromkeys(
        (json.dumps(run["data"]), run["epochs"], run["settings"], run["device"]) for run in runs
    ):
        text = json.loads(data)
        parts.append(f"{text['name']}, {text['bytes']:,} bytes; {epochs} epochs; {device}; {settings}")
    return "\n\n".join(parts)


def _why(run: dict[str, Any]) -> str:
    done = f"{len(run['bits'])} of {run['epochs']} epochs"
    return f"failed after {done}: {run['error']}" if run["status"] == "failed" else f"stopped after {done}"


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Bits per byte beside what the paper's ablation lets one expect."""
    columns = ["", "local modules", "parameters trained", "seeds", "bits per byte", "above BP", "above BP, %"]
    columns.append("in the paper, %")
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * 7 + "|"]
    for row in rows:
        excess = row["paper_excess"]
        cells = [
            row["row"],
            NONE if row["row"] == "BP" else str(row["local_modules"]),
            f"{row['parameters_trained']:,}",
            str(len(row["seeds"])),
            _spread(row["bits"], ".3f"),
            _spread(row["difference"], "+.3f"),
            difference(row["excess"]),
            NONE if excess is None else f"{excess:+.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _spread(found: dict[str, Any] | None, form: str) -> str:
    if found is None:
        return NONE
    deviation = found["deviation"]
    return format(found["mean"], form) + ("" if deviation is None else f" ± {deviation:.3f}")


def samples(runs: Sequence[dict[str, Any]]) -> str:
    """What each run that is done wrote after its last epoch, as Markdown."""
    parts = ["# Samples after the last epoch"]
    for run in runs:
        if run["status"] == "done" and run["sample"] is not None:
            text = run["sample"].replace("```", "'''")
            parts.append(f"## {run['row']}, seed {run['seed']}\n\n```text\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def draw(path: Path, runs: Sequence[dict[str, Any]]) -> Path | None:
    """Bits per byte of the validation text over the training tokens: a line per row, the mean over its seeds.

    None, and no file, where no run is done.
    """
    done = [run for run in runs if run["status"] == "done"]
    if not done:
        return None
    figure, axes = style.new_figure(1, 1, (8.5, 4.8))
    chart = axes[0, 0]
    for name in dict.fromkeys(run["row"] for run in done):
        seeds = [run for run in done if run["row"] == name]
        columns = list(zip(*(run["bits"] for run in seeds), strict=True))
        millions = [(epoch + 1) * seeds[0]["train_tokens"] / 1e6 for epoch in range(len(columns))]
        color, dash = LINES[name]
        means = [sum(column) / len(column) for column in columns]
        chart.plot(millions, means, dash, color=color, marker="o", markersize=3, label=name)
        if len(seeds) > 1:
            chart.fill_between(
                millions, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.15, lw=0
            )
    chart.set_xlabel("training bytes, millions", fontsize=9, color=style.QUIET)
    chart.set_ylabel("bits per byte, validation text", fontsize=9, color=style.QUIET)
    chart.legend(frameon=False, fontsize=9, labelcolor=style.INK)
    style.plain(chart, "y")
    return style.write(figure, path, "Language models of bytes", _conditions(done).partition("\n")[0])

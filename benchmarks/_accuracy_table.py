"""What the runs of ``benchmarks/accuracy.py`` come to: a record of each, means over seeds, and the table."""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from _accuracy_rows import ROWS
from _accuracy_runs import read_state
from _papers import AUGLOCAL, Figure, dataset_of, find_figure

from auglocal_ext import models

TOLERANCE = 0.5
"""Points by which a difference to backpropagation may miss the paper's, and AugLocal d = 6 backpropagation."""

STANDARD_WIDTHS = (None, 16)


def collect(folder: Path) -> list[dict[str, Any]]:
    """A record of every run below ``folder``, in the order of networks, epochs, rows and seeds."""
    found = [record for path in folder.glob("*") if (record := _record(path)) is not None]
    rows, networks = list(ROWS), models.NAMES
    return sorted(
        found,
        key=lambda run: (
            networks.index(run["network"]),
            run["epochs"],
            run["settings"],
            rows.index(run["row"]),
            run["seed"],
        ),
    )


def _record(folder: Path) -> dict[str, Any] | None:
    state = read_state(folder)
    if state is None:
        return None
    record = {name: state[name] for name in ("network", "row", "epochs", "seed", "settings", "device")}
    record["command"] = f"python -m auglocal_ext train --data DIR --output OUTPUT {state['options']}"
    record |= {name: state[name] for name in ("status", "error", "sittings")} | _training(folder)
    record["wall_seconds"] = sum(sitting["wall_seconds"] for sitting in state["sittings"])
    return record


def _training(folder: Path) -> dict[str, Any]:
    """What the training command wrote: its facts and log; None and nothing where it did not come that far."""
    try:
        config = json.loads((folder / "config.json").read_text())
        lines = (folder / "log.csv").read_text().splitlines()
    except FileNotFoundError:
        return {"data": None, "dataset": None, "standard_width": None, "local_modules": None, "log": []} | _summary([])
    return {
        "data": {name: config["data"][name] for name in ("classes", "train_images", "test_images", "input_shape")},
        "dataset": dataset_of(config),
        "standard_width": config["settings"]["width"] in STANDARD_WIDTHS,
        "local_modules": config["data"]["local_modules"],
        "threads": config["threads"],
        "versions": config["versions"],
        **_summary(list(csv.DictReader(lines))),
        "log": lines,
    }


def _summary(epochs: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Accuracies are fractions; images/s is the median of the epochs; peaks start anew when a run is taken up."""
    if not epochs:
        return {"epochs_done": 0}
    accuracies = [float(epoch["test_accuracy"]) for epoch in epochs]
    return {
        "epochs_done": len(epochs),
        "last_test_accuracy": accuracies[-1],
        "best_test_accuracy": max(accuracies),
        "best_epoch": accuracies.index(max(accuracies)) + 1,
        "train_seconds": sum(float(epoch["seconds"]) for epoch in epochs),
        "images_per_second": statistics.median(float(epoch["images_per_second"]) for epoch in epochs),
        "peak_bytes": max(int(epoch["peak_bytes"]) for epoch in epochs),
    }


def accuracies(run: dict[str, Any]) -> list[float]:
    """Test accuracy after each epoch, in percent."""
    return [100 * float(epoch["test_accuracy"]) for epoch in csv.DictReader(run["log"])]


def group(runs: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tables: runs on the same network, epochs, settings, device and images, a row per rule.

    Rows of one group differ in the rule and nothing else, so that differences are the rule's. A run that is not done
    counts in no mean.
    """
    tables: dict[str, dict[str, Any]] = {}
    for run in runs:
        about = {name: run[name] for name in ("network", "epochs", "settings", "device", "data", "dataset")}
        if run["data"] is None:  # it failed before it had any images: with those it shares its settings with
            same = [t for t in tables.values() if all(t[name] == about[name] for name in ("network", "epochs"))]
            about |= {name: same[0][name] for name in ("data", "dataset")} if same else {}
        table = tables.setdefault(json.dumps(about), {**about, "runs": []})
        table["runs"].append(run)
    return [_table(table) for table in tables.values()]


def _table(table: dict[str, Any]) -> dict[str, Any]:
    runs = table.pop("runs")
    names = dict.fromkeys(run["row"] for run in runs)
    bp = {run["seed"]: run for run in runs if run["row"] == "BP" and run["status"] == "done"}
    rows = [_row(name, [run for run in runs if run["row"] == name], bp, table["dataset"]) for name in names]
    return {**table, "rows": rows, "unlike": _unlike(runs)}


def _row(name: str, runs: list[dict[str, Any]], bp: dict[int, dict[str, Any]], dataset: str | None) -> dict[str, Any]:
    """Means over the seeds that are done; accuracies in percent, differences in points to BP of the same seeds."""
    done = [run for run in runs if run["status"] == "done"]
    pairs = [(run, bp[run["seed"]]) for run in done if run["seed"] in bp and name != "BP"]
    row: dict[str, Any] = {
        "row": name,
        "local_modules": next((run["local_modules"] for run in runs if run["local_modules"]), None),
        "seeds": [run["seed"] for run in done],
        "not_done": [f"seed {run['seed']}: {_why(run)}" for run in runs if run["status"] != "done"],
    }
    for which in ("last", "best"):
        key = f"{which}_test_accuracy"
        row[which] = spread([100 * run[key] for run in done])
        row[f"{which}_difference"] = spread([100 * (run[key] - other[key]) for run, other in pairs])
    for key, reduce in _REDUCED.items():
        row[key] = reduce([run[key] for run in done]) if done else None
    figure = None
    if done and done[0]["standard_width"]:
        figure = find_figure(dataset, done[0]["network"], name, row["local_modules"])
    return row | _beside(name, row["best_difference"], figure)


_REDUCED: dict[str, Callable[[Any], float]] = {
    "train_seconds": statistics.mean,
    "images_per_second": statistics.median,
    "peak_bytes": max,
}


def _why(run: dict[str, Any]) -> str:
    if run["status"] == "failed":
        return f"failed after {run['epochs_done']} epochs: {run['error']}"
    return f"stopped after {run['epochs_done']} of {run['epochs']} epochs"


def spread(values: Sequence[float]) -> dict[str, Any] | None:
    """Mean, deviation (n - 1; None for one value) and number of values; None for no value."""
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "deviation": deviation, "n": len(values)}


def _beside(name: str, ours: dict[str, Any] | None, figure: Figure | None) -> dict[str, Any]:
    """The paper's figure, how far our difference to BP is from its, and whether what is expected holds.

    The papers' figures are those of the best epoch, so ours is too.
    """
    if figure is None:
        return {"paper": None, "beside_paper": None, "misses": []}
    paper = {
        "accuracy": figure.accuracy,
        "deviation": figure.deviation,
        "difference": None if name == "BP" else figure.difference,
        "source": figure.source.name,
        "what": figure.source.what,
    }
    if ours is None or name == "BP":
        return {"paper": paper, "beside_paper": None, "misses": []}
    beside, misses = ours["mean"] - figure.difference, []
    if abs(beside) > TOLERANCE:
        misses.append(f"{abs(beside):.2f} points {'above' if beside > 0 else 'below'} the paper's difference to BP")
    if name == "AugLocal d=6" and figure.source is AUGLOCAL and ours["mean"] < -TOLERANCE:
        misses.append(f"{-ours['mean']:.2f} points below BP")
    return {"paper": paper, "beside_paper": beside, "misses": misses}


def _unlike(runs: Iterable[dict[str, Any]]) -> list[str]:
    """In what the runs of a table were made differently, so that their times do not compare."""
    sittings = [sitting for run in runs for sitting in run["sittings"]]
    texts = []
    if any(sitting["runs_at_a_time"] > 1 for sitting in sittings):
        texts.append("several runs shared the machine")
    if len({json.dumps(sitting["machine"], sort_keys=True) for sitting in sittings}) > 1:
        texts.append("they were made on more than one machine")
    if len({sitting["commit"] for sitting in sittings}) > 1:
        texts.append("they were made at more than one commit")
    return texts

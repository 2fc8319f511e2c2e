"""Learning curves of ``benchmarks/accuracy.py``: test accuracy over epochs, a panel for each table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _accuracy_table import accuracies
from _accuracy_text import conditions, heading

from auglocal_ext import pictures as style

# One hue for the depths of AugLocal, one for ContSup's contexts, one for MAN; dashes where hues come close.
LINES = {
    "BP": ("#000000", "-"),
    "AugLocal d=2": ("#f4a582", "-"),
    "AugLocal d=3": ("#ea7b5f", "-"),
    "AugLocal d=4": ("#d6503f", "-"),
    "AugLocal d=5": ("#b2182b", "-"),
    "AugLocal d=6": ("#7a0019", "-"),
    "ContSup R0": ("#9ecae1", "--"),
    "ContSup E": ("#4292c6", "--"),
    "ContSup R1E": ("#084594", "--"),
    "DGL": ("#2a9d5c", "-"),
    "PredSim": ("#b8a100", "-"),
    "InfoPro": ("#17a2a2", "-."),
    "Greedy": ("#8a8f96", "-"),
    "MAN": ("#c77cdb", "-."),
    "MAN + DGL": ("#6a3d9a", "-."),
}


def draw(path: Path, tables: Sequence[dict[str, Any]], runs: Sequence[dict[str, Any]]) -> Path | None:
    """Write the PNG: a line per row, the mean over the seeds that are done, in a band from the least to the greatest.

    None, and no file, where no run is done.
    """
    panels = [(table, _curves(table, runs)) for table in tables]
    panels = [(table, curves) for table, curves in panels if curves]
    if not panels:
        return None
    figure, axes = style.new_figure(len(panels), 1, (11, 0.7 + 5.2 * len(panels)))
    for chart, (table, curves) in zip(axes[:, 0], panels, strict=True):
        for name, seeds in curves.items():
            _line(chart, name, seeds)
        _finish(chart, table, curves)
    return style.write(figure, path, "Test accuracy")


def _curves(table: dict[str, Any], runs: Sequence[dict[str, Any]]) -> dict[str, list[list[float]]]:
    """Per row the accuracies of each seed."""
    same = ("network", "epochs", "settings", "device", "data", "dataset")
    found: dict[str, list[list[float]]] = {}
    for run in runs:
        if run["status"] == "done" and all(run[name] == table[name] for name in same):
            found.setdefault(run["row"], []).append(accuracies(run))
    return found


def _line(chart: Any, name: str, seeds: Sequence[Sequence[float]]) -> None:
    epochs = range(1, len(seeds[0]) + 1)
    columns = list(zip(*seeds, strict=True))
    color, dash = LINES[name]
    marker = "o" if len(epochs) == 1 else None
    wide = 2.2 if name == "BP" else 1.6
    means = [sum(column) / len(column) for column in columns]
    chart.plot(epochs, means, dash, color=color, linewidth=wide, marker=marker, markersize=4, label=name, zorder=3)
    if len(seeds) > 1:
        chart.fill_between(epochs, list(map(min, columns)), list(map(max, columns)), color=color, alpha=0.15, lw=0)


def _finish(chart: Any, table: dict[str, Any], curves: dict[str, list[list[float]]]) -> None:
    from matplotlib.ticker import MaxNLocator

    seeds = max(map(len, curves.values()))
    note = f"mean of {seeds} seeds, band from least to greatest" if seeds > 1 else "one seed"
    chart.set_title(heading(table), loc="left", fontsize=12, fontweight="bold", color=style.INK, pad=22)
    chart.annotate(
        f"{conditions(table)}; {note}",
        (0, 1),
        (0, 7),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=8.5,
        color=style.QUIET,
    )
    chart.set_xlabel("epoch", fontsize=9, color=style.QUIET)
    chart.set_ylabel("test accuracy, %, on a scale of log(error)", fontsize=9, color=style.QUIET)
    _scale(chart, [value for seeds in curves.values() for seed in seeds for value in seed])
    if table["epochs"] > 1:
        chart.set_xlim(1, table["epochs"])
    chart.xaxis.set_major_locator(MaxNLocator(integer=True))
    style.plain(chart, "y")
    order = sorted(curves, key=lambda name: -sum(seed[-1] for seed in curves[name]) / len(curves[name]))
    handles = dict(zip(*reversed(chart.get_legend_handles_labels()), strict=True))
    chart.legend(
        [handles[name] for name in order],
        order,
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
        borderaxespad=0,
        frameon=False,
        fontsize=9.5,
        labelcolor=style.INK,
        title="by last accuracy",
        title_fontsize=8.5,
        alignment="left",
    )


def _scale(chart: Any, values: Sequence[float]) -> None:
    """A log scale of the error, which draws apart what is close to 100 %, labelled with accuracies."""
    import numpy as np
    from matplotlib.ticker import NullLocator

    least_error = 0.02

    def forward(accuracy: Any) -> Any:
        return -np.log(np.maximum(100 - np.asarray(accuracy, dtype=float), least_error))

    def inverse(place: Any) -> Any:
        return 100 - np.exp(-np.asarray(place, dtype=float))

    ordered = sorted(values)
    # An outlier of an early epoch must not press the rest together.
    low, high = ordered[len(ordered) // 50], ordered[-1]
    chart.set_yscale("function", functions=(forward, inverse))
    chart.set_ylim(math.floor(low) - 1, min(100 - least_error, high + max(0.3, (100 - high) * 0.05)))
    known = [*range(0, 70, 5), 70, 75, 80, 85, 88, 90, 91, 92, 93, 94, 95, 96, 97, 98, 99, 99.5]
    chart.set_yticks([tick for tick in known if chart.get_ylim()[0] <= tick <= chart.get_ylim()[1]])
    chart.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    chart.yaxis.set_minor_locator(NullLocator())

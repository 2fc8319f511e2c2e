"""Pictures of ``benchmarks/step.py``: bars of time and peak for each row, and lines over depth and batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from auglocal_ext import pictures as style
from auglocal_ext.memory.plot import GB

COLORS = {
    "BP": "#8a94a0",
    "checkpointing": "#e3a857",
    "compile": "#b0a08a",
    "released": "#7b6d8d",
    "AugLocal": "#d1495b",
}
LINES = {
    "BP bf16": ("BP", "-"),
    "BP checkpointing bf16": ("checkpointing", "-"),
    "AugLocal d=2 graph": ("AugLocal", "-"),
    "AugLocal d=6 graph": ("AugLocal", "--"),
}


def draw_rows(path: Path, networks: dict[str, list[dict[str, Any]]], title: str, subtitle: str) -> Path | None:
    """One line of two charts per network: time (or, where none was taken, operators) and peak of each row."""
    shown = {name: [row for row in rows if _drawn(row)] for name, rows in networks.items()}
    shown = {name: rows for name, rows in shown.items() if rows}
    if not shown:
        return None
    heights = [0.9 + 0.27 * max(len(rows), 4) for rows in shown.values()]
    figure, axes = style.new_figure(len(shown), 2, (13.5, 1.0 + sum(heights)), height_ratios=heights)
    for (name, rows), (left, right) in zip(shown.items(), axes, strict=True):
        labels = [f"{row['name']}" for row in rows]
        colors = [COLORS[row["family"]] for row in rows]
        label, values = _work(rows)
        _bars(left, labels, values, colors, label)
        left.set_title(name, loc="left", fontsize=12, fontweight="bold", color=style.INK)
        measured = any(row["allocated_peak_bytes"] for row in rows)
        kind = "allocated peak" if measured else "predicted peak, without library workspaces"
        _bars(right, [""] * len(rows), [_gigabytes(row) for row in rows], colors, f"{kind}, GB (1e9 bytes)")
    return style.write(figure, path, title, subtitle)


def draw_scaling(path: Path, points: list[dict[str, Any]], title: str, subtitle: str) -> Path | None:
    """Peak, and where it was measured time, over depth (left) and batch (right)."""
    points = [point for point in points if _gigabytes(point) is not None]
    if not points:
        return None
    timed = any(point["seconds_per_step"] for point in points)
    figure, axes = style.new_figure(2 if timed else 1, 2, (13.5, 8.6 if timed else 4.9))
    for column, (over, label) in enumerate((("depth", "layers of a CIFAR ResNet"), ("batch", "images per step"))):
        here = [point for point in points if point["over"] == over]
        if here:
            _lines(axes[0][column], here, _gigabytes)
            fixed = f"batch {here[0]['batch']}" if over == "depth" else here[0]["network"]
            axes[0][column].set_title(fixed, loc="left", fontsize=12, fontweight="bold", color=style.INK)
            if timed:
                _lines(axes[1][column], here, _milliseconds)
        for chart in axes[:, column]:
            chart.set_visible(bool(here))
        axes[-1][column].set_xlabel(label, fontsize=9, color=style.QUIET)
    kind = "allocated peak" if any(point["allocated_peak_bytes"] for point in points) else "predicted peak"
    axes[0][0].set_ylabel(f"{kind}, GB (1e9 bytes)", fontsize=9, color=style.QUIET)
    if timed:
        axes[1][0].set_ylabel("ms per step", fontsize=9, color=style.QUIET)
    axes[0][0].legend(loc="upper left", frameon=False, fontsize=9.5, labelcolor=style.INK)
    return style.write(figure, path, title, subtitle)


def _drawn(row: dict[str, Any]) -> bool:
    return bool(_gigabytes(row) is not None or row["seconds_per_step"] or row["counts"])


def _work(rows: Sequence[dict[str, Any]]) -> tuple[str, list[float | None]]:
    if any(row["seconds_per_step"] for row in rows):
        return "ms per step", [_milliseconds(row) for row in rows]
    return "operators per step, forward, backward and update", [row["counts"].get("operators") for row in rows]


def _milliseconds(row: dict[str, Any]) -> float | None:
    return 1e3 * row["seconds_per_step"]["median"] if row["seconds_per_step"] else None


def _gigabytes(row: dict[str, Any]) -> float | None:
    nbytes = row["allocated_peak_bytes"] or row["predicted_peak_bytes"]
    return nbytes / GB if nbytes else None


def _bars(axes: Any, labels: Sequence[str], values: Sequence[float | None], colors: Sequence[str], label: str) -> None:
    places = range(len(values))
    axes.barh(places, [value or 0 for value in values], color=colors, height=0.72, zorder=2)
    text = {"textcoords": "offset points", "va": "center", "fontsize": 9, "color": style.INK}
    for place, value in zip(places, values, strict=True):
        axes.annotate(_text(value), (value or 0, place), (5, 0), **text)
    axes.set_yticks(places, labels, fontsize=9.5)
    axes.set_ylim(len(values) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * max([value for value in values if value] or [1]))
    axes.set_xlabel(label, fontsize=9, color=style.QUIET)
    style.plain(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _text(value: float | None) -> str:
    if value is None:
        return "none"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _lines(axes: Any, points: Sequence[dict[str, Any]], value: Any) -> None:
    for name in dict.fromkeys(point["name"] for point in points):
        line = [(point["at"], value(point)) for point in points if point["name"] == name and value(point) is not None]
        if line:
            family, dash = LINES[name]
            x, y = zip(*line, strict=True)
            axes.plot(x, y, dash, color=COLORS[family], marker="o", markersize=4, linewidth=1.6, label=name)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    style.plain(axes, "y")

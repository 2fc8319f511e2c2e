"""Draw the memory of training steps: peak bars, and live bytes through one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auglocal_ext.memory.estimate import decimate

GB = 1e9
_INK, _QUIET, _GRID = "#22262b", "#6b7480", "#e3e7eb"
_TIMELINE_POINTS = 2000


@dataclass(frozen=True)
class PlotRow:
    """One training method in a panel.

    ``peak_bytes`` is the bar, ``other_bytes`` a figure reported elsewhere (a hollow diamond), ``timeline``
    the ``(event, live bytes)`` of one step, drawn if ``emphasis``; ``color`` any matplotlib colour.
    """

    label: str
    peak_bytes: int
    color: str
    timeline: Sequence[tuple[int, int]] = ()
    other_bytes: float | None = None
    emphasis: bool = False


def plot_memory(
    panels: Sequence[tuple[str, Sequence[PlotRow]]],
    path: str | Path,
    *,
    title: str,
    subtitle: str = "",
    other_label: str = "",
) -> Path:
    """Write a PNG with one line of two charts per panel: peaks as bars, and live bytes through one step.

    Args:
        panels: ``(name, rows)``; the first row of a panel is what the others are compared with.
        path: file to write; its folder is made.
        title, subtitle: one line each, above the charts.
        other_label: what ``PlotRow.other_bytes`` is, for the legend.

    Raises ``ImportError`` if matplotlib is missing and ``ValueError`` if there is nothing to draw.
    """
    if not panels or not all(rows for _, rows in panels):
        raise ValueError("expected at least one panel and at least one row in each, got none")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(f"drawing needs matplotlib ({error}); pip install matplotlib") from error

    heights = [1.1 + 0.34 * max(len(rows), 7) for _, rows in panels]
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, hspace=0.04, wspace=0.03)
    size = (13.5, 1.15 + sum(heights))
    figure = Figure(figsize=size, dpi=150, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 2, squeeze=False, width_ratios=(1, 1.35), height_ratios=heights)
    for (name, rows), (bars, timeline) in zip(panels, axes, strict=True):
        _draw_bars(bars, name, rows, other_label)
        _draw_timeline(timeline, rows)
    heading = figure.suptitle(title, x=0.012, ha="left", fontsize=15, fontweight="bold", color=_INK)
    if subtitle:
        heading.set_text(f"{title}\n")
        figure.text(0.012, 1 - 0.52 / figure.get_figheight(), subtitle, fontsize=9.5, color=_QUIET, va="center")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw_bars(axes: Any, name: str, rows: Sequence[PlotRow], other_label: str) -> None:
    base = rows[0].peak_bytes
    peaks = [row.peak_bytes / GB for row in rows]
    others = [(y, row.other_bytes / GB) for y, row in enumerate(rows) if row.other_bytes]
    reach = 1.1 * max(peaks + [other for _, other in others])
    axes.barh(range(len(rows)), peaks, color=[row.color for row in rows], height=0.7, zorder=2)
    beside = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "right", "fontsize": 9.5}
    for y, row in enumerate(rows):
        axes.text(1.16, y, _significant(peaks[y]), color=_INK, fontweight="bold", **beside)
        axes.text(1.29, y, f"{row.peak_bytes / base:.0%}", color=_QUIET, **beside)
    heads = {**beside, "transform": axes.transAxes, "va": "bottom", "fontsize": 9, "color": _QUIET}
    axes.text(1.16, 1.012, "GB", **heads)
    axes.text(1.29, 1.012, "of first", **heads)
    if others:
        at_rows, values = zip(*others, strict=True)
        style = {"linestyle": "none", "marker": "D", "markersize": 5.5, "markerfacecolor": "white"}
        axes.plot(values, at_rows, **style, markeredgecolor=_INK, markeredgewidth=1.1, zorder=3, label=other_label)
        for at, value in others:
            text = {"textcoords": "offset points", "va": "center", "fontsize": 8.5, "color": _QUIET}
            axes.annotate(_significant(value), (value, at), (7, 0), annotation_clip=False, **text)
        axes.legend(loc="lower right", frameon=False, fontsize=8.5, handletextpad=0.1, labelcolor=_QUIET)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=9.5, color=_INK)
    axes.set_ylim(len(rows) - 0.4 + (0.9 if others else 0), -0.6)
    axes.set_xlim(0, reach)
    axes.set_xlabel("peak, GB (1e9 bytes)", fontsize=9, color=_QUIET)
    axes.set_title(name, loc="left", fontsize=12, fontweight="bold", color=_INK)
    _plain(axes, "x")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _draw_timeline(axes: Any, rows: Sequence[PlotRow]) -> None:
    shown = [row for row in rows if row.emphasis and row.timeline]
    for layer, row in enumerate(shown):
        points = decimate(row.timeline, _TIMELINE_POINTS)
        first, last = points[0][0], points[-1][0]
        x = [100 * (event - first) / max(1, last - first) for event, _ in points]
        y = [live / GB for _, live in points]
        label = f"{row.label}: {_significant(max(y))} GB"
        axes.fill_between(x, y, color=row.color, alpha=min(0.25 + 0.25 * layer, 0.75), linewidth=0, zorder=2 + layer)
        axes.plot(x, y, color=row.color, linewidth=1.1, zorder=2.5 + layer, label=label)
    axes.set_xlim(0, 100)
    axes.margins(y=0.06)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("progress through the step, % of its operators", fontsize=9, color=_QUIET)
    axes.set_ylabel("live bytes through one step, GB", fontsize=9, color=_QUIET)
    if shown:
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": len(shown), "borderaxespad": 0.2}
        axes.legend(**above, frameon=False, fontsize=9.5, labelcolor=_INK, handlelength=1.3, columnspacing=1.6)
    else:
        axes.text(0.5, 0.5, "no timeline in these rows", transform=axes.transAxes, ha="center", color=_QUIET)
    _plain(axes, "y")


def _plain(axes: Any, grid: str) -> None:
    axes.grid(axis=grid, color=_GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_GRID)
    axes.tick_params(colors=_QUIET, labelsize=9)
    for label in axes.get_yticklabels():
        label.set_color(_INK if grid == "x" else _QUIET)


def _significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"

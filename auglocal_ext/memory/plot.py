"""Draw the memory of training steps: peak bars, and live bytes through one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pictures import INK, QUIET, new_figure, plain, write
from .estimate import decimate

GB = 1e9
_TIMELINE_POINTS = 2000


@dataclass(frozen=True)
class PlotRow:
    """One training method in a panel.

    Attributes:
        label: name beside the bar.
        peak_bytes: length of the bar.
        color: any matplotlib colour.
        timeline: ``(event, live bytes)`` of one step, drawn if ``emphasis``.
        other_bytes: a figure reported elsewhere, drawn as a hollow diamond.
        emphasis: whether the timeline is drawn and the row stands out.
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
        title: line above the charts.
        subtitle: smaller line below the title.
        other_label: what ``PlotRow.other_bytes`` is, for the legend.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if there is nothing to draw.
    """
    if not panels or not all(rows for _, rows in panels):
        raise ValueError("expected at least one panel and at least one row in each, got none")
    heights = [1.1 + 0.34 * max(len(rows), 7) for _, rows in panels]
    size = (13.5, 1.15 + sum(heights))
    figure, axes = new_figure(len(panels), 2, size, width_ratios=(1, 1.35), height_ratios=heights)
    for (name, rows), (bars, timeline) in zip(panels, axes, strict=True):
        _draw_bars(bars, name, rows, other_label)
        _draw_timeline(timeline, rows)
    return write(figure, path, title, subtitle)


def _draw_bars(axes: Any, name: str, rows: Sequence[PlotRow], other_label: str) -> None:
    base = rows[0].peak_bytes
    peaks = [row.peak_bytes / GB for row in rows]
    others = [(y, row.other_bytes / GB) for y, row in enumerate(rows) if row.other_bytes]
    reach = 1.1 * max(peaks + [other for _, other in others])
    axes.barh(range(len(rows)), peaks, color=[row.color for row in rows], height=0.7, zorder=2)
    beside = {"transform": axes.get_yaxis_transform(), "va": "center", "ha": "right", "fontsize": 9.5}
    for y, row in enumerate(rows):
        axes.text(1.16, y, _significant(peaks[y]), color=INK, fontweight="bold", **beside)
        axes.text(1.29, y, f"{row.peak_bytes / base:.0%}", color=QUIET, **beside)
    heads = {**beside, "transform": axes.transAxes, "va": "bottom", "fontsize": 9, "color": QUIET}
    axes.text(1.16, 1.012, "GB", **heads)
    axes.text(1.29, 1.012, "of first", **heads)
    if others:
        at_rows, values = zip(*others, strict=True)
        style = {"linestyle": "none", "marker": "D", "markersize": 5.5, "markerfacecolor": "white"}
        axes.plot(values, at_rows, **style, markeredgecolor=INK, markeredgewidth=1.1, zorder=3, label=other_label)
        for at, value in others:
            text = {"textcoords": "offset points", "va": "center", "fontsize": 8.5, "color": QUIET}
            axes.annotate(_significant(value), (value, at), (7, 0), annotation_clip=False, **text)
        axes.legend(loc="lower right", frameon=False, fontsize=8.5, handletextpad=0.1, labelcolor=QUIET)
    axes.set_yticks(range(len(rows)), [row.label for row in rows], fontsize=9.5, color=INK)
    axes.set_ylim(len(rows) - 0.4 + (0.9 if others else 0), -0.6)
    axes.set_xlim(0, reach)
    axes.set_xlabel("peak, GB (1e9 bytes)", fontsize=9, color=QUIET)
    axes.set_title(name, loc="left", fontsize=12, fontweight="bold", color=INK)
    plain(axes, "x")
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
    axes.set_xlabel("progress through the step, % of its operators", fontsize=9, color=QUIET)
    axes.set_ylabel("live bytes through one step, GB", fontsize=9, color=QUIET)
    if shown:
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": len(shown), "borderaxespad": 0.2}
        axes.legend(**above, frameon=False, fontsize=9.5, labelcolor=INK, handlelength=1.3, columnspacing=1.6)
    else:
        axes.text(0.5, 0.5, "no timeline in these rows", transform=axes.transAxes, ha="center", color=QUIET)
    plain(axes, "y")


def _significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"

"""How figures look: colours of text and grid, the blank figure, its heading. Drawing needs matplotlib, no display."""

from __future__ import annotations

from pathlib import Path
from typing import Any

INK, QUIET, GRID = "#22262b", "#6b7480", "#e3e7eb"


def new_figure(lines: int, columns: int, size: tuple[float, float], **ratios: Any) -> tuple[Any, Any]:
    """A figure of ``size`` (width, height in inches) and its axes, an array (lines, columns).

    ``ratios`` are matplotlib's ``width_ratios`` and ``height_ratios``. Raises ImportError if matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(f"drawing needs matplotlib ({error}); pip install matplotlib") from error
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, hspace=0.04, wspace=0.03)
    figure = Figure(figsize=size, dpi=120, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(lines, columns, squeeze=False, **ratios)


def plain(axes: Any, grid: str) -> None:
    """No frame, quiet ticks, and grid lines along ``grid``, ``"x"`` or ``"y"``: the axis of the numbers."""
    axes.grid(axis=grid, color=GRID, linewidth=0.8, zorder=0)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(colors=QUIET, labelsize=9)
    for label in axes.get_yticklabels():
        label.set_color(INK if grid == "x" else QUIET)


def write(figure: Any, path: str | Path, title: str, subtitle: str = "") -> Path:
    """Save the figure as PNG below its heading, one line each; the folder is made."""
    width, height = figure.get_size_inches()
    left = 0.14 / width
    heading = figure.suptitle(title, x=left, ha="left", fontsize=14, fontweight="bold", color=INK)
    if subtitle:
        heading.set_text(f"{title}\n")
        figure.text(left, 1 - 0.5 / height, subtitle, va="center", fontsize=9.5, color=QUIET)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path

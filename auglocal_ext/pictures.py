"""How figures look: colours of text and grid, the blank figure, its heading. Drawing needs matplotlib, no display."""

from __future__ import annotations

from collections.abc import Callable
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


def depth_colors(modules: int) -> Callable[[int], Any]:
    """The colour of each of ``modules`` local modules: from light, the first, to dark, the last."""
    from matplotlib import colormaps

    # The light end of the map is too faint for a line on white.
    shades = colormaps["viridis_r"].resampled(256)
    return lambda k: shades(1.0 if modules == 1 else 0.12 + 0.88 * k / (modules - 1))


def depth_bar(figure: Any, axes: Any, modules: int) -> None:
    """The colours of the local modules, beside ``axes``, one of the figure's or several; counted from 0."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.ticker import MaxNLocator

    shades = depth_colors(modules)
    norm = BoundaryNorm([k - 0.5 for k in range(modules + 1)], modules)
    scale = ScalarMappable(norm, ListedColormap([shades(k) for k in range(modules)]))
    ticks = MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]).tick_values(0, modules - 1)
    bar = figure.colorbar(scale, ax=axes, aspect=18, pad=0.02, ticks=[t for t in ticks if 0 <= t < modules])
    bar.outline.set_visible(False)
    bar.ax.minorticks_off()
    bar.ax.tick_params(colors=QUIET, labelsize=8.5, length=2)
    bar.set_label("local module", fontsize=9, color=QUIET)


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

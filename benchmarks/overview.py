"""The picture at the head of README.md, drawn from result files; it measures nothing.

    python benchmarks/overview.py                            # writes benchmarks/results/overview.png

Left: live bytes through one training step of ResNet-110. Right: the peak of a step over the depth of the network. Both
are predicted at batch 1024 in bf16; the files are those that _tables_results.py calls "memory-bf16" and "scaling".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import _environment  # noqa: F401  first: it makes the package importable
from _step_plot import COLORS
from _tables_results import GB, RESULTS, network_rows, scaling_rows

from auglocal_ext.pictures import INK, QUIET, new_figure, plain

NETWORK, TITLE = "resnet110", "ResNet-110"
BOLD = {"fontsize": 15, "fontweight": "bold"}


@dataclass(frozen=True)
class Curve:
    """A method: its rows in the two files, its colours, and where its name stands in the left chart (%, GB)."""

    name: str
    step: str
    depth: str
    line: str
    fill: str
    ink: str
    at: tuple[float, float]


BP, CHECKPOINTING, AUGLOCAL = CURVES = (
    Curve("backpropagation", "BP", "BP bf16", COLORS["BP"], "#e3e6ea", "#5b6470", (48, 2.5)),
    Curve(
        "checkpointing",
        "BP checkpointing",
        "BP checkpointing bf16",
        COLORS["checkpointing"],
        "#f6e3c3",
        "#9a6114",
        (48, 1.22),
    ),
    Curve("AugLocal", "AugLocal d=2", "AugLocal d=2 graph", COLORS["AugLocal"], "#e08a97", "#b3283d", (52, 0.3)),
)


def draw_step(axes: Any) -> None:
    """Live bytes from the first operator of a step to its last."""
    reports = {name: row["predicted"] for name, row in network_rows("memory-bf16", NETWORK).items()}
    for layer, curve in enumerate(CURVES):
        timeline = reports[curve.step]["timeline"]
        first, last = timeline[0][0], timeline[-1][0]
        x = [100 * (event - first) / (last - first) for event, _ in timeline]
        y = [live / GB for _, live in timeline]
        axes.fill_between(x, y, color=curve.fill, linewidth=0, zorder=2 + layer)
        axes.plot(x, y, color=curve.line, linewidth=1.5, zorder=2.5 + layer)
        text = f"{curve.name}  {_peak(reports, curve):.1f} GB"
        axes.text(*curve.at, text, color=curve.ink, ha="center", va="bottom", zorder=9, **BOLD)
    least, most = _peak(reports, AUGLOCAL), _peak(reports, BP)
    _heading(axes, f"{TITLE} in {least:.1f} GB, not {most:.1f}", "live bytes through a training step, batch 1024, bf16")
    axes.set_xlim(0, 100)
    axes.set_ylim(0, 4.6)
    axes.set_yticks((0, 2, 4), ("0", "2", "4 GB"))
    axes.set_xticks((0, 100), ("start of the step", "end"))
    axes.get_xticklabels()[0].set_horizontalalignment("left")
    _quiet(axes)


def draw_depth(axes: Any) -> None:
    """The peak of a step at every depth there is."""
    found = scaling_rows("depth")
    depths = [int(at) for at in found]
    for curve in CURVES:
        peaks = [rows[curve.depth]["predicted_peak_bytes"] / GB for rows in found.values()]
        axes.plot(depths, peaks, color=curve.line, linewidth=3, marker="o", markersize=6, clip_on=False, zorder=3)
        beside = {"textcoords": "offset points", "annotation_clip": False, "color": curve.ink}
        axes.annotate(f"{peaks[-1]:.1f} GB", (depths[-1], peaks[-1]), (13, 1), va="bottom", **beside, **BOLD)
        axes.annotate(curve.name, (depths[-1], peaks[-1]), (13, -2), va="top", **beside, fontsize=14)
    least, most = (found[str(depths[-1])][curve.depth]["predicted_peak_bytes"] / GB for curve in (AUGLOCAL, BP))
    finding = f"{depths[-1]:,} layers in {least:.1f} GB, not {most:.1f}"
    _heading(axes, finding, "its peak over depth; all predicted, AugLocal at d = 2")
    axes.set_xlim(0, depths[-1])
    axes.set_ylim(0, 52)
    axes.set_yticks((0, 20, 40), ("0", "20", "40 GB"))
    axes.set_xticks((110, 434, depths[-1]), ("110", "434", f"{depths[-1]:,} layers"))
    _quiet(axes)


def _peak(reports: dict[str, Any], curve: Curve) -> float:
    return reports[curve.step]["peak_bytes"] / GB


def _heading(axes: Any, finding: str, what: str) -> None:
    axes.set_title(f"{finding}\n", loc="left", fontsize=20, fontweight="bold", color=INK, linespacing=1.5)
    axes.text(0, 1.03, what, transform=axes.transAxes, fontsize=14, color=QUIET, va="bottom")


def _quiet(axes: Any) -> None:
    plain(axes, "y")
    axes.tick_params(labelsize=14, length=0, pad=7)
    axes.spines["left"].set_visible(False)
    axes.get_xticklabels()[-1].set_horizontalalignment("right")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "overview.png", help="file to write")
    output = parser.parse_args(arguments).output
    figure, ((left, right),) = new_figure(1, 2, (13.34, 5.0), width_ratios=(1.2, 1))
    draw_step(left)
    draw_depth(right)
    figure.savefig(output)
    print(f"written: {output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

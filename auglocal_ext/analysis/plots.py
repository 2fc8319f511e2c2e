"""Pictures of the analyses, as PNG files: a heat map per run, and lines of all runs over layers, modules and epochs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import pictures as style
from ..training.run.curves import Curves, draw_modules_over_epochs
from .cka import CKA
from .curves import ModuleScore
from .information import Information
from .probes import LayerProbe
from .tables import thinned

COLORS = ("#d1495b", "#2f6f9f", "#e3a857", "#3f8f6b", "#7b6d8d", "#4fb3bf", "#a0522d", "#8a94a0")
DASHES = ("-", "--", ":")
_SMALL = {"fontsize": 9, "color": style.QUIET}


def draw_cka(path: Path, cka: CKA, run: str, reference: str) -> Path:
    """Heat map of one run's layers (upwards) by those of the reference (to the right), colours from 0 to 1."""
    rows, columns = cka.matrix.shape
    unit = min(0.55, 8.0 / max(rows, columns))  # inches a layer
    figure, ((axes,),) = style.new_figure(1, 1, (max(unit * columns, 2.0) + 2.4, max(unit * rows, 2.0) + 2.1))
    image = axes.imshow(cka.matrix.numpy(), vmin=0, vmax=1, cmap="magma", origin="lower", interpolation="nearest")
    for axis, names, turned in ((axes.xaxis, cka.names_b, 90), (axes.yaxis, cka.names_a, 0)):
        shown = thinned(len(names), 28)
        axis.set_ticks(shown, [names[i] for i in shown], rotation=turned, fontsize=8, color=style.INK)
    axes.tick_params(length=2, color=style.GRID)
    axes.set_xlabel(f"layers of {reference}", **_SMALL)
    axes.set_ylabel(f"layers of {run}", **_SMALL)
    for spine in axes.spines.values():
        spine.set_visible(False)
    bar = figure.colorbar(image, ax=axes, aspect=24, pad=0.02)
    bar.outline.set_visible(False)
    bar.ax.tick_params(colors=style.QUIET, labelsize=8.5, length=2)
    bar.set_label("linear CKA", **_SMALL)
    title = f"{run}: layers by layers" if run == reference else f"{run} beside {reference}"
    return style.write(figure, path, title, f"linear CKA, unbiased, {cka.images:,} test images")


def draw_matched(path: Path, runs: Mapping[str, CKA], reference: str) -> Path:
    """CKA of each layer with the same layer of the reference, a line per run."""
    figure, (axes,) = _line_figure(1, runs)
    _lines(axes, {run: (cka.names_a, cka.matched.tolist()) for run, cka in runs.items()})
    axes.set_ylim(min(0.0, axes.get_ylim()[0]), 1.02)
    axes.set_ylabel("linear CKA", **_SMALL)
    _legend(figure, axes, runs)
    images = max(cka.images for cka in runs.values())
    return style.write(
        figure,
        path,
        f"Each layer beside the same layer of {reference}",
        f"linear CKA, unbiased, {images:,} test images",
    )


def draw_probes(path: Path, runs: Mapping[str, Sequence[LayerProbe]]) -> Path:
    """Test accuracy of a linear classifier on each frozen layer, a line per run."""
    figure, (axes,) = _line_figure(1, runs)
    _lines(
        axes,
        {
            run: ([probe.name for probe in probes], [100 * p.test_accuracy for p in probes])
            for run, probes in runs.items()
        },
    )
    axes.set_ylabel("test accuracy, %", **_SMALL)
    _legend(figure, axes, runs)
    return style.write(
        figure, path, "What a linear classifier reads out of each layer", "linear probes on frozen features"
    )


def draw_information(path: Path, runs: Mapping[str, Information]) -> Path:
    """I(h, x), I(h, y) and the strong probe's accuracy over the layers: a line per run, and what no line is above.

    An I(h, y) far below zero is that of a probe which is sure of wrong answers: the chart is cut off there.
    """
    figure, (image, label, accuracy) = _line_figure(3, runs)
    layers = {run: ([layer.name for layer in found.layers], found.layers) for run, found in runs.items()}
    _lines(image, {run: (names, [layer.image_information for layer in at]) for run, (names, at) in layers.items()})
    _lines(label, {run: (names, [layer.label_information for layer in at]) for run, (names, at) in layers.items()})
    _lines(accuracy, {run: (names, [100 * layer.accuracy for layer in at]) for run, (names, at) in layers.items()})
    _limits(image, "the image itself", [found.blank_error - found.perfect_error for found in runs.values()])
    entropies = [found.label_entropy for found in runs.values()]
    lowest = -max(entropies) / 4
    if label.get_ylim()[0] < lowest:
        label.set_ylim(lowest, label.get_ylim()[1])
        label.annotate(
            "lower values are cut off", (1, 0), (-4, 4), "axes fraction", "offset points", ha="right", **_SMALL
        )
    _limits(label, "entropy of the labels", entropies)
    image.set_ylabel("I(h, x), nats per value of the image", **_SMALL)
    label.set_ylabel("I(h, y), nats", **_SMALL)
    accuracy.set_ylabel("accuracy of the strong classifier, %", **_SMALL)
    _legend(figure, image, runs)
    return style.write(
        figure,
        path,
        "What each layer tells of the image and of the label",
        "estimates: by reconstruction of the image (left), by a strong classifier (centre, right), on test images",
    )


def draw_curves(path: Path, runs: Mapping[str, Curves]) -> Path:
    """Training loss and accuracy of each local module over the epochs: a line of two charts per run."""
    figure, charts = style.new_figure(len(runs), 2, (13.5, 1.0 + 3.1 * len(runs)))
    for (run, curves), (loss, accuracy) in zip(runs.items(), charts, strict=True):
        draw_modules_over_epochs(figure, loss, accuracy, curves)
        loss.set_title(run, loc="left", fontsize=12, fontweight="bold", color=style.INK)
    return style.write(
        figure, path, "How the local modules learn", "a line per local module, from the first to the last"
    )


def draw_modules(path: Path, runs: Mapping[str, Sequence[ModuleScore]]) -> Path:
    """Loss and accuracy of each local module on test images, at the last of its layers: a line per run."""
    figure, (loss, accuracy) = _line_figure(2, runs)
    losses: dict[str, Any] = {}
    accuracies: dict[str, Any] = {}
    for run, scores in runs.items():
        names = [name for score in scores for name in score.layers]
        at = [sum(len(s.layers) for s in scores[: k + 1]) - 1 for k in range(len(scores))]
        for found, values in (
            (losses, [score.loss for score in scores]),
            (accuracies, [100 * score.accuracy for score in scores]),
        ):
            over = dict(zip(at, values, strict=True))
            found[run] = (names, [over.get(i, math.nan) for i in range(len(names))])
    _lines(loss, losses)
    _lines(accuracy, accuracies)
    loss.set_ylabel("local loss", **_SMALL)
    accuracy.set_ylabel("accuracy of the module's classifier, %", **_SMALL)
    _legend(figure, loss, runs)
    return style.write(
        figure, path, "The local modules on test images", "a point at the last layer of each local module"
    )


def _lines(axes: Any, runs: Mapping[str, tuple[Sequence[str], Sequence[float]]]) -> None:
    """A line per run over its layers, which are named if all runs have the same, and else counted."""
    for i, (run, (_, values)) in enumerate(runs.items()):
        there = [(at, value) for at, value in enumerate(values) if not math.isnan(value)]
        at, shown = zip(*there, strict=True) if there else ((), ())
        dash = DASHES[i // len(COLORS) % len(DASHES)]
        look = {"color": COLORS[i % len(COLORS)], "linestyle": dash, "linewidth": 1.6, "zorder": 3}
        axes.plot(at, shown, marker="o", markersize=4 if len(shown) <= 30 else 2.5, label=run, **look)
    named = {tuple(names) for names, _ in runs.values()}
    longest = max(len(names) for names, _ in runs.values())
    if len(named) == 1:
        (names,) = named
        ticks = thinned(longest)
        turned = 90 if max(len(names[i]) for i in ticks) * len(ticks) > 70 else 0
        axes.set_xticks(ticks, [names[i] for i in ticks], rotation=turned)
    else:
        axes.set_xlabel("layer", **_SMALL)
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlim(-0.02 * longest - 0.2, longest - 0.8 + 0.02 * longest)
    style.plain(axes, "y")
    axes.tick_params(axis="x", labelsize=8.5)


def _limits(axes: Any, text: str, values: Sequence[float]) -> None:
    """What no line can be above, each value once."""
    for value in sorted({round(value, 3) for value in values}):
        axes.axhline(value, color=style.QUIET, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1.5)
        axes.annotate(text, (0, value), (0, 3), textcoords="offset points", va="bottom", **_SMALL)
        bottom, top = axes.get_ylim()
        axes.set_ylim(min(0.0, bottom), max(1.1 * value, top))


def _line_figure(columns: int, runs: Iterable[str]) -> tuple[Any, Any]:
    """A row of charts with room for the runs below them."""
    width = {1: 9.0, 2: 13.5, 3: 16.5}[columns]
    figure, (axes,) = style.new_figure(1, columns, (width, 4.4 + 0.2 * _legend_rows(width, list(runs))[1]))
    return figure, axes


def _legend(figure: Any, axes: Any, runs: Iterable[str]) -> None:
    """The runs, below the charts."""
    columns, _ = _legend_rows(figure.get_figwidth(), list(runs))
    place = {"loc": "outside lower left", "ncols": columns, "frameon": False}
    figure.legend(*axes.get_legend_handles_labels(), **place, fontsize=9.5, labelcolor=style.INK)


def _legend_rows(width: float, labels: Sequence[str]) -> tuple[int, int]:
    """Columns and rows of a legend in a figure of ``width`` inches."""
    columns = max(1, min(len(labels), int(width / (0.6 + 0.085 * max(map(len, labels))))))
    return columns, -(-len(labels) // columns)

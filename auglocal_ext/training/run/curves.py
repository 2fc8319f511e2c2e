"""Learning curves of a run: what its ``log.csv`` says, and ``curves.png``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import pictures as style
from ..errors import CheckpointError
from ..paths import user_path
from .log_file import read_rows
from .logs import IMAGES, TOKENS, columns
from .measures import ACCURACY, FORMS, Form

_TRAIN, _TEST = "#2f6f9f", "#d1495b"
_FEW = 12  # epochs, of which each has a tick and a point
_SMALL = {"fontsize": 9, "color": style.QUIET}


@dataclass(frozen=True, eq=False)
class Curves:
    """A run's ``log.csv``: E epochs of K local modules, float64 on the CPU; accuracies are fractions.

    ``train_loss`` and ``test_loss`` are the network's own, ``local_loss_sum`` is the sum of the local losses, those of
    the rule, and so not comparable from rule to rule. ``module_accuracies`` are those of each module's own classifier
    on the training images, as they were during the epoch: augmented, in training mode, nan where it has none.
    What a run does not measure is None. Of masks, accuracies are over pixels, of text over tokens.
    """

    epochs: Tensor
    train_loss: Tensor
    test_loss: Tensor
    train_accuracy: Tensor
    test_accuracy: Tensor
    local_loss_sum: Tensor
    module_losses: Tensor
    module_accuracies: Tensor
    train_miou: Tensor | None = None
    test_miou: Tensor | None = None
    module_mious: Tensor | None = None
    train_bits_per_byte: Tensor | None = None
    test_bits_per_byte: Tensor | None = None
    module_bits_per_byte: Tensor | None = None
    train_perplexity: Tensor | None = None
    test_perplexity: Tensor | None = None
    module_perplexities: Tensor | None = None

    @property
    def metric(self) -> tuple[Form, Tensor, Tensor, Tensor]:
        """What is drawn: its name, and its values in training, in the test, and of each module in training.

        mIoU of masks; of text perplexity, or bits per byte where tokens are bytes; else the accuracy.
        """
        for form in reversed(FORMS[1:]):
            train, test = getattr(self, f"train_{form.column}"), getattr(self, f"test_{form.column}")
            modules = getattr(self, form.modules)
            if train is not None and test is not None and modules is not None:
                return form, train, test, modules
        return ACCURACY, self.train_accuracy, self.test_accuracy, self.module_accuracies


def read_curves(folder: str | Path) -> Curves:
    """The curves in the ``log.csv`` of a run folder, of a run that goes on or is over.

    Raises CheckpointError if there is no such file, if it holds no epoch, or none of this version's columns.
    """
    path = user_path(folder) / "log.csv"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected the folder of a run, as `train --output` makes it")
    there, rows = read_rows(path)
    forms = {ACCURACY, *(form for form in FORMS if f"test_{form.column}" in there)}
    unit = next((unit for unit in (TOKENS, IMAGES) if f"{unit}_per_second" in there), IMAGES)
    if missing := [name for name in columns(forms, unit) if there and name not in there]:
        raise CheckpointError(f"{path}: no column {', '.join(missing)}: another version wrote it, train the run again")
    if not rows:
        raise CheckpointError(f"{path}: no finished epoch yet; go on with `train --resume` first")
    values = {
        name: torch.tensor([[float(value) for value in row[name].split()] for row in rows], dtype=torch.float64)
        for name in [field.name for field in fields(Curves) if field.name in there and field.name != "epochs"]
    }
    epochs = torch.tensor([float(row["epoch"]) for row in rows], dtype=torch.float64)
    return Curves(epochs, **{n: v if n.startswith("module_") else v[:, 0] for n, v in values.items()})


def draw_run(path: Path, curves: Curves, title: str, subtitle: str) -> Path:
    """The network's loss and accuracy, training and test; below them those of each local module, if it has several.

    The task's own measure takes the accuracy's place.
    Local modules are told by colour, from light, the first, to dark, the last. Their own classifiers' accuracies are
    beside the network's on the test images, a dashed line. A loss that spans more than a factor of 20 has a logarithmic
    axis.
    """
    modules = curves.module_losses.shape[1]
    rows = 2 if modules > 1 else 1
    figure, charts = style.new_figure(rows, 2, (11.0, 1.0 + 3.2 * rows))
    loss, accuracy = charts[0]
    form, trained, tested, _ = curves.metric
    scale = 100 if form.percent else 1
    for axes, lines in ((loss, (curves.train_loss, curves.test_loss)), (accuracy, (scale * trained, scale * tested))):
        for values, color, label in zip(lines, (_TRAIN, _TEST), ("training", "test"), strict=True):
            axes.plot(curves.epochs.tolist(), values.tolist(), color=color, label=label, **_line(curves, 1.8))
        axes.legend(loc="best", frameon=False, fontsize=9, labelcolor=style.INK)
    _loss_scale(loss, torch.cat([curves.train_loss, curves.test_loss]))
    loss.set_title("the network", **_HEADING)
    loss.set_ylabel("loss", **_SMALL)
    accuracy.set_ylabel(_named(form), **_SMALL)
    if modules > 1:
        below_loss, below_accuracy = charts[1]
        draw_modules_over_epochs(figure, below_loss, below_accuracy, curves)
        below_loss.set_title(f"its {modules} local modules", **_HEADING)
    for axes in charts.flat:
        _epoch_axis(axes, curves)
    return style.write(figure, path, title, subtitle)


_HEADING: dict[str, Any] = {"loc": "left", "fontsize": 11, "fontweight": "bold", "color": style.INK}


def draw_modules_over_epochs(figure: Any, loss: Any, accuracy: Any, curves: Curves) -> None:
    """Training loss and accuracy of each local module, on two axes, with the network's test accuracy in the second."""
    modules = curves.module_losses.shape[1]
    colors, epochs = style.depth_colors(modules), curves.epochs.tolist()
    form, _, of_test, of_modules = curves.metric
    scale = 100 if form.percent else 1
    for k in range(modules):
        look = {"color": colors(k), **_line(curves, 1.2 if modules <= 20 else 0.9)}
        loss.plot(epochs, curves.module_losses[:, k].tolist(), **look)
        accuracy.plot(epochs, (scale * of_modules[:, k]).tolist(), **look)
    _loss_scale(loss, curves.module_losses)
    tested = {"color": _TEST, "linewidth": 1.6, "linestyle": (0, (4, 2)), "label": "the network, test"}
    accuracy.plot(epochs, (scale * of_test).tolist(), **tested)
    accuracy.legend(loc="best", frameon=False, fontsize=8.5, labelcolor=style.QUIET)
    loss.set_ylabel("local loss, training", **_SMALL)
    accuracy.set_ylabel(_named(form, ", training"), **_SMALL)
    for axes in (loss, accuracy):
        _epoch_axis(axes, curves)
    if modules > 1:
        style.depth_bar(figure, accuracy, modules)


def _named(form: Form, of: str = "") -> str:
    return f"{form.name}{of}{', %' if form.percent else ''}"


def _line(curves: Curves, width: float) -> Mapping[str, Any]:
    """Few epochs are points on the line: one alone would not be seen."""
    return {"linewidth": width, **({"marker": "o", "markersize": 3} if len(curves.epochs) <= _FEW else {})}


def _loss_scale(axes: Any, losses: Tensor) -> None:
    """Logarithmic where the largest loss would press all others flat: BatchNorm's test loss early in a run does."""
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    losses = losses[losses.isfinite()]
    if len(losses) and losses.min() > 0 and losses.max() > 20 * losses.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="minor", color=style.GRID)


def _epoch_axis(axes: Any, curves: Curves) -> None:
    if len(curves.epochs) <= _FEW:
        axes.set_xticks(curves.epochs.tolist())
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("epoch", **_SMALL)
    style.plain(axes, "y")

"""How each local module learns: loss and accuracy over the epochs, and on images it was not trained on."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor, nn

from ..layers import evaluating
from ..local_sequential import LocalSequential
from ..tasks import Classification
from ..training import CheckpointError
from ..training.logs import EpochRow, progress_bar
from ..training.metrics import EpochSums, StepResult
from .features import layer_names


@dataclass(frozen=True, eq=False)
class Curves:
    """A run's ``log.csv``: E epochs of K local modules, float64 on the CPU; accuracies are fractions.

    ``train_loss`` is the sum of the local losses, those of the rule, and so not comparable from rule to rule;
    ``test_loss`` is the network's cross-entropy. ``module_accuracies`` are those of each module's own classifier on
    the training images, as they were during the epoch: augmented, in training mode, nan where it has none.
    """

    epochs: Tensor
    train_loss: Tensor
    test_loss: Tensor
    train_accuracy: Tensor
    test_accuracy: Tensor
    module_losses: Tensor
    module_accuracies: Tensor


@dataclass(frozen=True)
class ModuleScore:
    """A local module on held-out images: its mean local loss and its own classifier's accuracy (nan: it has none).

    ``layers`` are the names of its layers, the classifier's among the last module's.
    """

    index: int
    layers: tuple[str, ...]
    loss: float
    accuracy: float


def read_curves(folder: str | Path) -> Curves:
    """The curves in the ``log.csv`` of a run folder, of a run that goes on or is over.

    Raises CheckpointError if there is no such file, if it holds no epoch, or none of this version's columns.
    """
    path = Path(folder).expanduser() / "log.csv"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected the folder of a run, as `train --output` makes it")
    text = path.read_text()
    lines = text[: text.rfind("\n") + 1].splitlines()  # the last row may be cut short
    rows = list(csv.DictReader(lines))
    names = [field.name for field in fields(EpochRow)]
    if missing := [name for name in names if lines and name not in lines[0].split(",")]:
        raise CheckpointError(f"{path}: no column {', '.join(missing)}: another version wrote it, train the run again")
    if not rows:
        raise CheckpointError(f"{path}: no finished epoch yet; go on with `train --resume` first")
    columns = {
        name: torch.tensor([[float(value) for value in row[name].split()] for row in rows], dtype=torch.float64)
        for name in [field.name for field in fields(Curves) if field.name != "epochs"]
    }
    single = {name: values[:, 0] for name, values in columns.items() if not name.startswith("module_")}
    epochs = torch.tensor([float(row["epoch"]) for row in rows], dtype=torch.float64)
    return Curves(epochs, **single, **{name: columns[name] for name in ("module_losses", "module_accuracies")})


def module_scores(
    network: LocalSequential | nn.Sequential, batches: Iterable[tuple[Tensor, Tensor]], *, bars: bool = False
) -> list[ModuleScore]:
    """Mean local loss and accuracy of every local module through its own auxiliary network.

    Protocol: all parts in eval mode (BatchNorm by its running statistics, no dropout), in the network's precision,
    without gradients; context is supplied as in training. The loss is the one the rule trains the module by, its
    terms and weights included, averaged over the images; losses between the images of a batch (PredSim's similarity,
    InfoPro's contrast) depend on the batch size. The accuracy is over the targets that the network's task counts, nan
    where it counts something else. A network without local modules is one module with the cross-entropy.

    Args:
        network: trained; its modes are restored.
        batches: held-out images and labels, on the network's device: ``source.test()``.
        bars: show a progress bar where standard error is a terminal.

    Raises:
        ValueError: if there are no batches.
    """
    names = layer_names(network)
    if isinstance(network, LocalSequential):
        stops = [end + 1 for end in network.network.ends]
    else:
        stops = [len(names)]
    stops[-1] = len(names)
    sums: EpochSums | None = None
    with evaluating(network), progress_bar(None, "local modules", "image", bars) as bar:
        for images, labels in batches:
            sums = sums or EpochSums(len(stops), images.device)
            sums.add(_result(network, images, labels), len(labels))
            bar.update(len(labels))
    if sums is None:
        raise ValueError("no batches: expected at least one batch of held-out images, such as source.test()")
    reading = sums.read()
    return [
        ModuleScore(index, tuple(names[start:stop]), loss, accuracy)
        for index, (start, stop, loss, accuracy) in enumerate(
            zip([0, *stops], stops, reading.module_losses, reading.module_accuracies, strict=False)
        )
    ]


def _result(network: LocalSequential | nn.Sequential, images: Tensor, labels: Tensor) -> StepResult:
    if isinstance(network, LocalSequential):
        out, task = network(images, labels), network.task
        counts = out.module_counts if task.metric == "accuracy" else torch.full_like(out.module_counts, -1)
        return StepResult(out.loss, out.module_losses, counts, task.counted(labels))
    logits = network(images)
    return StepResult.of_one_module(Classification(logits.shape[1]).score(logits, labels), len(labels))

"""How well each local module does on images it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import evaluating
from ..local_sequential import LocalSequential
from ..tasks import Classification
from ..training.progress_bar import progress_bar
from ..training.run.metrics import EpochSums, StepResult
from .features import layer_names


@dataclass(frozen=True)
class ModuleScore:
    """A local module on held-out images: its mean local loss and its own classifier's accuracy (nan: it has none).

    ``layers`` are the names of its layers, the classifier's among the last module's.
    """

    index: int
    layers: tuple[str, ...]
    loss: float
    accuracy: float


def module_scores(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, bars: bool = False
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


def _result(network: nn.Module, images: Tensor, labels: Tensor) -> StepResult:
    if isinstance(network, LocalSequential):
        out, task = network(images, labels), network.task
        counts = out.module_counts if task.metric == "accuracy" else torch.full_like(out.module_losses, -1)
        return StepResult(out.loss, out.module_losses, counts, task.counted(labels))
    logits = network(images)
    return StepResult.of_one_module(Classification(logits.shape[1]).score(logits, labels), len(labels))

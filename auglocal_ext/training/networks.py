"""The network of a run: by its name, and cut into local modules."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..local_sequential import LocalSequential, localize
from ..models import default_classes, is_segmentation
from ..partition import Balanced
from ..rules import Rule
from ..tasks import Classification, Segmentation, Task


def task_of(name: str, num_classes: int | None = None) -> Task:
    """What the network ``name`` is for, with its own number of classes unless another is said."""
    classes = default_classes(name) if num_classes is None else num_classes
    return Segmentation(classes) if is_segmentation(name) else Classification(classes)


def cut(
    network: nn.Module,
    rule: Rule,
    task: Task,
    input_shape: Sequence[int],
    modules: int | Sequence[int] | Balanced | None = None,
    *,
    fused: bool = True,
) -> LocalSequential:
    """``network`` cut into local modules: an ``nn.Sequential`` between its children, any other by ``localize``.

    Of the dictionary that torchvision's segmentation networks return ``"out"`` is learned.
    """
    if isinstance(network, nn.Sequential):
        return LocalSequential(network, rule, task=task, input_shape=input_shape, modules=modules, fused=fused)
    return localize(
        network,
        rule,
        task=task,
        input_shape=input_shape,
        modules=modules,
        fused=fused,
        output="out" if isinstance(task, Segmentation) else None,
    )

"""The network of a run: by its name, and cut into local modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...local_sequential import LocalSequential, localize
from ...models import default_classes, is_segmentation
from ...partition import Balanced
from ...rules import Rule
from ...tasks import Classification, LanguageModelling, Segmentation, Task


def task_of(name: str, num_classes: int | None = None) -> Classification | Segmentation:
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
        given: Any = {"input_shape": input_shape}
        if isinstance(task, LanguageModelling):
            given = {"example_input": example_input(task, input_shape)}
        return LocalSequential(network, rule, task=task, modules=modules, fused=fused, **given)
    return localize(
        network,
        rule,
        task=task,
        input_shape=input_shape,
        modules=modules,
        fused=fused,
        output="out" if isinstance(task, Segmentation) else None,
    )


def example_input(task: Task, input_shape: Sequence[int], count: int = 1) -> Tensor:
    """So many inputs of zeros: images, or of a language model tokens."""
    return torch.zeros(count, *input_shape, dtype=torch.int64 if isinstance(task, LanguageModelling) else None)

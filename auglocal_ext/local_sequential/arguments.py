"""What the wrappers' arguments say: what is learned, what an input is like, where to cut, what is recomputed."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from ..auxiliary.base import Auxiliary, Part
from ..layers import nesting_hint, probe_input
from ..local_modules import RECOMPUTE, Recompute
from ..partition import Balanced
from ..rules.balance import balanced_ends
from ..rules.base import Network, Rule
from ..tasks import Classification, Criterion, Task


def what_is_learned(
    num_classes: int | None,
    task: Task | None,
    criterion: Callable[[Tensor, Tensor], Tensor] | None,
    outputs: int | None,
    label_smoothing: float,
    ignore_index: int,
) -> Task:
    given = [
        name
        for name, value in (("num_classes", num_classes), ("task", task), ("criterion", criterion))
        if value is not None
    ]
    if len(given) != 1:
        raise ValueError(
            "say what is learned by one of num_classes=N, task=Regression(...) or another task, and criterion=function "
            f"with outputs=N; got {' and '.join(given) if given else 'none of them'}"
        )
    if (outputs is not None) != (criterion is not None):
        raise ValueError("criterion=function goes with outputs=N, the numbers that the network puts out per sample")
    if num_classes is not None:
        return Classification(num_classes, label_smoothing=label_smoothing, ignore_index=ignore_index)
    if label_smoothing != 0.0 or ignore_index != -100:
        raise ValueError(
            f"label_smoothing and ignore_index belong to num_classes=N; say them in the {given[0]} itself, such as "
            "task=Classification(N, label_smoothing=0.1)"
        )
    if criterion is not None:
        assert outputs is not None
        return Criterion(criterion, outputs)
    if not isinstance(task, Task):
        raise TypeError(f"task must be a task such as Classification(10) or Regression(1), got {task!r}")
    return task


def refuse_own_task(part: Part, task: Task, module: int) -> None:
    """ValueError if a part of an auxiliary network learns a task that does not go with the network's ``task``."""
    own = part.settings.task
    if own is task:
        return
    who = f"{type(part).__name__} of local module {module} learns a task of its own, a {type(own).__name__}"
    if next(own.buffers(), None) is not None:
        raise ValueError(
            f"{who} that has buffers: they would not move with the network. Hold them in the auxiliary network"
        )
    if isinstance(part, Auxiliary) and own.count_shape != task.count_shape:
        raise ValueError(
            f"{who} that counts in the shape {own.count_shape}, but {type(task).__name__}, the network's, counts in "
            f"{task.count_shape}, and counts of all local modules are one tensor: take the network's task for the head"
        )


def one_input(layers: nn.Module, input_shape: Sequence[int] | None, example_input: Tensor | None) -> Tensor:
    """One input, ``(1, ...)``, on the network's device and, if it is floating point, in its dtype."""
    if (input_shape is None) == (example_input is None):
        raise ValueError("pass either input_shape, such as (3, 32, 32), or example_input, a tensor (1, *input_shape)")
    if example_input is None:
        try:
            shape = tuple(operator.index(size) for size in cast("Sequence[int]", input_shape))
        except TypeError:
            shape = ()
        if not shape or min(shape) < 1:
            raise ValueError(
                "input_shape is the shape of one input without the batch dimension, such as (3, 32, 32) of images or "
                f"(12,) of vectors; got {input_shape!r}"
            )
        return probe_input(layers, shape)
    if not isinstance(example_input, Tensor) or example_input.dim() < 2 or len(example_input) < 1:
        found = tuple(example_input.shape) if isinstance(example_input, Tensor) else type(example_input).__name__
        raise ValueError(f"example_input must be a tensor (1, *input_shape) with the batch first, got {found}")
    if example_input.is_complex():
        raise TypeError(f"example_input must be floating point, or integers such as tokens; got {example_input.dtype}")
    template = probe_input(layers, (), 0)
    example = example_input[:1].detach().to(template.device)
    return example.to(template.dtype) if example.is_floating_point() else example


def ends_of_modules(
    network: Network, rule: Rule, example: Tensor, modules: int | Sequence[int] | Balanced | None
) -> tuple[int, ...]:
    """Index of the last layer of each local module; ``example`` is an input ``(1, *input_shape)``."""
    try:
        if isinstance(modules, Balanced):
            return balanced_ends(network, rule, example, modules.modules, modules.by)
        return rule.ends(len(network.layers), modules)
    except ValueError as error:
        hint = nesting_hint(network.primary)
        if not hint:
            raise
        raise ValueError(f"{error}{hint}") from error


def recompute_per_module(recompute: Recompute | Sequence[Recompute], layers: Sequence[int]) -> tuple[Recompute, ...]:
    """What each local module recomputes; ``layers`` is how many layers each has.

    Raises:
        ValueError: for what is no choice, and for more layers than a module has.
    """
    modules = len(layers)
    one = isinstance(recompute, (str, int)) or not isinstance(recompute, Iterable)
    chosen: tuple[Any, ...] = (recompute,) * modules if one else tuple(cast("Sequence[Recompute]", recompute))
    if len(chosen) != modules or not all(map(_is_recompute, chosen)):
        raise ValueError(
            f"recompute is one of {', '.join(RECOMPUTE)}, or a number n of at least 1, for the first n layers of a "
            f"local module, or a sequence with one of these for each of the {modules} local modules; got {recompute!r}"
        )
    for k, (choice, most) in enumerate(zip(chosen, layers, strict=True)):
        if not isinstance(choice, str) and choice > most:
            raise ValueError(
                f"recompute={recompute!r} names the first {choice} layers of local module {k}, which has {most}: give "
                f'it a number of at most {most}, or "all"'
            )
    return chosen


def _is_recompute(choice: Any) -> bool:
    if isinstance(choice, str):
        return choice in RECOMPUTE
    return isinstance(choice, int) and not isinstance(choice, bool) and choice >= 1

"""An optimizer for some of its parameters: its own ``step`` runs, and its other attributes are put back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .._torch import let_step_scale_gradients, step_scales_gradients


class ModuleOptimizer:
    """``whole`` for some of its parameters: what a training step and a ``GradScaler`` need of an optimizer.

    Attributes of ``whole`` that its step sets, such as a count of steps, are put back: the step of the next module
    finds them as this one did, and :meth:`ModuleOptimizers.finish` sets them. What its step changes in place, such as a
    list that it appends to, is changed once for each module.

    Args:
        whole: the user's optimizer.
        groups: copies of its parameter groups, with these parameters alone.
        written: receives the attributes that ``step`` has changed.
    """

    def __init__(self, whole: torch.optim.Optimizer, groups: list[dict[str, Any]], written: dict[str, Any]) -> None:
        self.param_groups = groups
        self._whole = whole
        self._written = written
        if step_scales_gradients(whole) or all(group.get("fused") for group in groups):
            let_step_scale_gradients(self)

    @property
    def step(self) -> Callable[..., Any]:
        """``step`` of the class of ``whole``, on these parameters."""
        plain = type(self._whole).step  # a scheduler's wrapper around the method is for the whole

        def step(*args: Any, **options: Any) -> Any:
            # Besides its groups, what a scaler has set for the time of a step.
            own = {key: value for key, value in vars(self).items() if key not in ("_whole", "_written")}
            with changed(self._whole, self._written, **own):
                return plain(self._whole, *args, **options)

        step.__wrapped__ = plain  # type: ignore[attr-defined]  # so that a GradScaler finds its arguments
        return step


@contextmanager
def changed(whole: torch.optim.Optimizer, written: dict[str, Any], **attributes: Any) -> Iterator[None]:
    """Within it ``whole`` has other ``attributes``; all are put back, and what else was set within is ``written``."""
    before, slots = dict(vars(whole)), slots_of(whole)
    for key, value in attributes.items():
        setattr(whole, key, value)
    try:
        yield
    finally:
        written.update(
            (key, value)
            for key, value in vars(whole).items()
            if key not in attributes and (key not in before or before[key] is not value)
        )
        vars(whole).clear()
        vars(whole).update(before)
        for key, value in slots_of(whole).items():
            if key not in slots:
                delattr(whole, key)
            elif slots[key] is not value:
                setattr(whole, key, slots[key])
            else:
                continue
            if key not in attributes:
                written[key] = value


def slots_of(whole: torch.optim.Optimizer) -> dict[str, Any]:
    """Attributes of classes with ``__slots__``, which are not among ``vars``."""
    names = (name for cls in type(whole).__mro__ for name in _names(vars(cls).get("__slots__", ())))
    return {name: getattr(whole, name) for name in names if hasattr(whole, name)}


def _names(slots: str | Iterable[str]) -> list[str]:
    given = [slots] if isinstance(slots, str) else slots
    return [name for name in given if name not in ("__dict__", "__weakref__") and not name.startswith("__")]

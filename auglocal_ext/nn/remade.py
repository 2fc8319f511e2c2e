"""Tensors that backward can make again from tensors that are kept anyway.

A layer that makes such an output notes a :class:`Source` beside it: what it was made from, and how. The linear layer
that reads the output saves the source's tensors in place of it. They stand in a table beside the tensor, not on it, so
the tensor's class, copies and pickles are torch's.

A source holds for the very tensor that was noted, as long as neither it nor what it was made from is written to. A
view, what a hook returns in its place, and a tensor that was changed in place have none: then the tensor itself is
saved.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._torch import FakeTensor, versions
from .fusable import must_be_eager

#: Makes the output from the tensors of its source, in their order.
Remake = Callable[[Sequence[Any]], Tensor]
_PLAIN = Tensor, torch.nn.Parameter, FakeTensor


class Once:
    """The output made again, which all its readers share in one backward pass: made by the first, dropped by the last.

    Where only some of them run, a normalisation's own backward, which comes after theirs, drops it.
    """

    def __init__(self) -> None:
        self.readers = 0
        self._left = 0
        self._made: Tensor | None = None

    def take(self, remake: Remake, tensors: Sequence[Any]) -> Tensor:
        """For one of the readers."""
        made = self._made
        if made is None:
            made = remake(tensors)
            self._left = self.readers
        self._left -= 1
        self._made = made if self._left > 0 else None
        return made

    def drop(self) -> None:
        self._made = None


class Source:
    """What an output was made from, and how it is made again.

    Attributes:
        remake: makes it from ``tensors``; holds no tensors itself.
        tensors: what it was made from; empty once the layer's backward has run, and what is read is saved as it is.
        once: what its readers share.
    """

    __slots__ = ("__weakref__", "_versions", "once", "remake", "tensors")

    def __init__(self, remake: Remake, tensors: Sequence[Tensor | None]) -> None:
        self.remake = remake
        self.tensors = tuple(tensors)
        self.once = Once()
        self._versions: list[int] = []

    def note(self, made: Tensor) -> Tensor:
        """``made``, from now on with this source."""
        self._versions = versions((made, *self.tensors))
        key = _Noted(made, _forget_key)
        key.number = id(made)
        _sources[key.number] = key, self
        return made

    def holds(self, made: Tensor) -> bool:
        return bool(self.tensors) and versions((made, *self.tensors)) == self._versions


class _Noted(weakref.ref[Tensor]):
    """A tensor that has a source; ``number`` is its id, which no other tensor gets while the table has it."""

    __slots__ = ("number",)
    number: int


#: By the id of the tensor. torch's dictionary of weak keys does the same, and takes the host several times as long.
_sources: dict[int, tuple[_Noted, Source]] = {}


def _forget_key(key: _Noted) -> None:
    _sources.pop(key.number, None)


def source_of(y: Tensor) -> Source | None:
    """The source of ``y``, if it has one that holds."""
    found = _sources.get(id(y))
    return found[1] if found is not None and found[1].holds(y) else None


def forget(y: Tensor) -> None:
    """``y`` has no source any more, so what it was made from is not kept for it: a recomputed layer keeps its input."""
    _sources.pop(id(y), None)


def recordable(x: Tensor, *parameters: Tensor | None) -> bool:
    """Whether a node of our own may stand for a layer's call on ``x``, which is recorded for backward.

    Subclasses of tensors, such as DTensor and quantised weights, have operators of their own.
    """
    if must_be_eager(x) or not torch.is_grad_enabled() or type(x) not in _PLAIN or x.is_inference():
        return False
    for tensor in parameters:
        if tensor is not None and type(tensor) not in _PLAIN:
            return False
    return True


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device."""
    known = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return known and torch.is_autocast_enabled(device)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast makes a linear layer compute ``x`` in; None where it is off or leaves ``x`` alone."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if autocasts(device) and x.dtype is not torch.float64 else None

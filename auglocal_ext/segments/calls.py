"""What a dry run of a model finds: its calls of submodules, the tensors that they return, and its operators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from .._torch import TreeSpec


@dataclass(frozen=True)
class Linear:
    """The size ``fixed + each * N`` for a batch of N."""

    fixed: int
    each: int

    def at(self, batch: int) -> int:
        return self.fixed + self.each * batch


@dataclass(frozen=True)
class Form:
    """A tensor's sizes, strides and dtype for any batch size."""

    sizes: tuple[Linear, ...]
    strides: tuple[Linear, ...]
    dtype: torch.dtype

    @property
    def per_sample(self) -> tuple[int, ...] | None:
        """The shape without the batch; None where the batch is not the first axis, or is in another one too."""
        first, *rest = self.sizes or (Linear(1, 0),)
        if (first.fixed, first.each) != (0, 1) or any(size.each for size in rest):
            return None
        return tuple(size.fixed for size in rest)

    def bytes(self, batch: int) -> int:
        return prod(size.at(batch) for size in self.sizes) * self.dtype.itemsize

    def meta(self, batch: int, dtype: torch.dtype) -> Tensor:
        sizes, strides = ([each.at(batch) for each in of] for of in (self.sizes, self.strides))
        return torch.empty_strided(sizes, strides, dtype=dtype, device="meta")


@dataclass(eq=False)
class Call:
    """One call of a submodule.

    Attributes:
        name: of the module.
        nth: which of the module's calls, from 0.
        parent, children: the calls around it and in it.
        start, end: operators that had run before and after it.
        spec, leaves: what it returned; a tensor as a :class:`Form`, an integer that grows with the batch as a
            :class:`Linear`, anything else as it is.
        data: whether any of it is data, or it returns no tensor at all: it is skipped where it lies before a segment.
        outputs: for each leaf the dry run's number of the tensor; -1 for others.
        takes: number of the one tensor that it takes, where ``module(tensor)`` is the same call; -1 where it is not.
        gives: as ``outputs``, with the number that the tensor had before calls handed it on.
        checkpointed: whether ``torch.utils.checkpoint`` ran it: "no", "alone", "with others" or "reentrant".
        opaque: what is in its output that no skipped call can return, such as "a DynamicCache"; empty if nothing is.
        assigns: names of the module's own buffers that its forward replaces by others.
    """

    name: str
    nth: int
    parent: Call | None
    start: int
    end: int = -1
    children: list[Call] = field(default_factory=list)
    spec: TreeSpec | None = None
    leaves: list[Any] = field(default_factory=list)
    data: bool = True
    outputs: list[int] = field(default_factory=list)
    takes: int = -1
    gives: list[int] = field(default_factory=list)
    checkpointed: str = "no"
    opaque: str = ""
    assigns: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.nth

    def returned(self, leaf: int) -> tuple[str, int, int]:
        """What names a leaf of its output."""
        return self.name, self.nth, leaf

    def walk(self) -> Iterator[Call]:
        """The calls inside, in the order in which they begin."""
        for child in self.children:
            yield child
            yield from child.walk()

    def ancestors(self) -> Iterator[Call]:
        call = self.parent
        while call is not None:
            yield call
            call = call.parent


@dataclass(frozen=True)
class Operator:
    """One operator of the dry run.

    Attributes:
        name: without namespace and overload.
        inputs, outputs: numbers of its tensors.
        own: the model's parameters and buffers that it takes.
        meets: those that went into what meets data here.
        data: whether its outputs are data.
        caller: innermost module that ran it.
        flops: of it, for the batch.
        writes: the model's parameters and buffers that it writes to.
        mark: whether the dry run itself added it, at the end of a call.
        random: whether it draws random numbers.
    """

    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    own: frozenset[str]
    meets: frozenset[str]
    data: bool
    caller: str
    flops: int
    writes: frozenset[str]
    mark: bool
    random: bool


@dataclass(eq=False)
class Recording:
    """What one dry run found.

    Attributes:
        root: the call of the model itself.
        operators: in the order in which they ran.
        data: numbers of the tensors that are data; 0 is the model's input.
        output: number of the tensor that is learned from.
        input: form of the model's input.
    """

    root: Call
    operators: list[Operator]
    data: set[int]
    output: int
    input: Form

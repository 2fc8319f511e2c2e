"""Local modules that are alike run once in a planned step; of each kind the first runs, and the others stand in.

A stand-in replaces a module if all parts of both are equal, down to plain attributes and tensor shapes, and their
inputs are too. It returns empty tensors of the right shapes. A deep network is therefore planned in about the time of
a shallow one. Modules with context all run, because their histories differ.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..auxiliary.base import LossContext
from ..local_modules import LocalModule
from ..step.optimizers import ModuleOptimizers
from ..tasks import Scored


class StandIns:
    """Which modules of a pass have run, and what the others stand in for; one for each pass.

    Args:
        gradients: let stand-ins have gradients too, where something of them stays: optimizer state, or themselves.
        used: for each module that has run, by index, which of its parameters have a gradient: a module may have some
            that its loss does not depend on. To be noted after its backward pass.

    Attributes:
        model: for each module, by index, the module that has run in its place; itself if it ran.
    """

    def __init__(self, gradients: bool, used: Mapping[int, tuple[bool, ...]]) -> None:
        self.gradients = gradients
        self.used = used
        self.model: dict[int, int] = {}
        self._firsts: dict[Hashable, StandIn] = {}

    def find(self, likeness: Hashable, module: StandIn) -> StandIn:
        """The module that runs for all of this likeness; ``module`` itself if it is the first."""
        found = module if likeness is None else self._firsts.setdefault(likeness, module)
        self.model[module.index] = found.index
        return found


class StandIn:
    """A local module in a planned step: it runs if it is the first of its likeness, or returns what the first one did.

    It makes output, loss, logits and, if asked, gradients of the right shapes without the work between, so that what
    the pass keeps is the same. It has what the pass asks of a module, :class:`auglocal_ext.local_modules.PassModule`.

    Args:
        module: the module.
        likeness: :func:`likeness_of` it; None lets it run in any case.
        stand_ins: those of the pass.
    """

    def __init__(self, module: LocalModule, likeness: Hashable, stand_ins: StandIns) -> None:
        self.index = module.index
        self.context = module.context
        self._module = module
        self._likeness = likeness
        self._stand_ins = stand_ins
        self._first = self
        self._output: TensorLikeness | None = None
        self._scored: tuple[TensorLikeness, TensorLikeness] | None = None

    def parameters(self) -> Iterator[nn.Parameter]:
        if self._first is self or self._stand_ins.gradients:
            yield from self._module.parameters()

    def parts(self) -> Iterator[nn.Module]:
        return self._module.parts()

    def loss_input(self, h: Tensor, history: list[Tensor | None] | None) -> Tensor:
        likeness = None if self._likeness is None else (self._likeness, TensorLikeness.of(h))
        self._first = self._stand_ins.find(likeness, self)
        if self._first is not self:
            assert self._first._output is not None
            return self._first._output.empty()
        out = self._module.loss_input(h, history)
        self._output = TensorLikeness.of(out)
        return out

    def objective(self, taken: Tensor, context: LossContext) -> Scored:
        if self._first is self:
            result = self._module.objective(taken, context)
            self._scored = TensorLikeness.of(result.output), TensorLikeness.of(result.tally)
            return result
        assert self._first._scored is not None
        trained = [p for p in self.parameters() if p.requires_grad]
        loss = _Gradients.apply(self._stand_ins.used[self._first.index], *trained)
        output, count = self._first._scored
        return Scored(loss, output.empty(), count.empty())

    def after_step(self) -> None:
        if self._first is self:
            self._module.after_step()


class _Gradients(torch.autograd.Function):
    """A loss whose gradients are of the parameters' shapes and no more."""

    @staticmethod
    def forward(ctx: Any, used: tuple[bool, ...], *parameters: Tensor) -> Tensor:
        ctx.used = used
        ctx.save_for_backward(*parameters)
        return torch.empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.used, strict=True)
        return (None, *(torch.empty_like(p) if used else None for p, used in pairs))


def likeness_of(module: LocalModule, optimizers: ModuleOptimizers) -> Hashable:
    """Equal for two modules that do the same work on inputs of one likeness; None for a module like no other.

    Everything that the parts hold is compared, down to plain values and the shapes of tensors, and which parameter
    group and module a parameter is stepped with. What is neither a module, a tensor, a plain value nor a collection
    counts as the same only if it is the same object.
    """
    if module.context is not None or module.index == 0:  # takes a history, or the batch, which outlives it
        return None
    if module.segment is not None:  # what a model's forward does beside its submodules is not compared
        return None
    of = _likeness(module, optimizers)
    return (
        of(module.groups),
        of(module.auxiliary),
        module.kept,
        module.weight,
        module.recompute,
        module.fused,
    )


def likenesses_of_layers(module: LocalModule, optimizers: ModuleOptimizers) -> list[Hashable]:
    """For each layer of a module what :func:`likeness_of` is for modules; segments of a model are like no other."""
    if module.segment is not None:
        return [object() for _ in module.groups]
    return [_likeness(module, optimizers)(group) for group in module.groups]


def _likeness(module: LocalModule, optimizers: ModuleOptimizers) -> Callable[[Any], Hashable]:
    """What makes something comparable that ``module`` holds."""
    groups = {id(p): index for index, group in enumerate(optimizers.whole.param_groups) for p in group["params"]}
    mine = {id(p) for group in optimizers.view(module.index).param_groups for p in group["params"]}

    within: set[int] = set()  # a module may refer to one that holds it

    def of(value: Any) -> Hashable:
        if isinstance(value, Tensor):
            return TensorLikeness.of(value), groups.get(id(value)), id(value) in mine
        if isinstance(value, nn.Module):
            if id(value) in within:
                return id(value)
            within.add(id(value))
            found = type(value), of(vars(value))
            within.remove(id(value))
            return found
        if isinstance(value, dict):
            return type(value), tuple((key, of(item)) for key, item in value.items())
        if isinstance(value, (tuple, list)):
            return type(value), tuple(of(item) for item in value)
        if isinstance(value, (set, frozenset)):
            return type(value), frozenset(of(item) for item in value)
        if is_dataclass(value) and not isinstance(value, type):
            return type(value), tuple((field.name, of(getattr(value, field.name))) for field in fields(value))
        if value is None or isinstance(value, (bool, int, float, str, torch.dtype, type)):
            return type(value), value
        return id(value)

    return of


class TensorLikeness(NamedTuple):
    """What the work on a tensor depends on, but its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage_bytes: int
    dtype: torch.dtype
    requires_grad: bool
    kind: type

    @staticmethod
    def of(tensor: Tensor) -> TensorLikeness:
        return TensorLikeness(
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.untyped_storage().nbytes(),
            tensor.dtype,
            tensor.requires_grad,
            type(tensor),
        )

    def empty(self) -> Tensor:
        """A new tensor like it, over a storage as large."""
        storage = torch.empty(self.storage_bytes // self.dtype.itemsize, dtype=self.dtype)
        return storage.as_strided(self.shape, self.stride, self.offset)

"""``localize``: local learning of any model, which stays as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast, get_args

import torch
from torch import Tensor, nn

from .._torch import FakeTensor, is_compiled, version
from ..layers import (
    Described,
    LayoutChoice,
    classifier_start,
    describe,
    evaluating,
    group_children,
    modules_of,
    starts_layer,
)
from ..local_modules import LocalModule, Recompute
from ..nn import refuse_sharding, unfuse
from ..partition import Balanced
from ..rules.base import Rule
from ..segments import Boundary, Passage, Segment, Skips, find_boundaries, picked_output
from ..tasks import Task
from .arguments import one_input, what_is_learned
from .sequential import LocalSequential

#: Where a model is cut: as for ``LocalSequential``, or the names of the submodules that local modules end with.
Modules = int | Sequence[int] | Sequence[str] | Balanced | None


class LocalizedModel(LocalSequential):
    """A model cut into local modules, each a segment of its own ``forward``; made by :func:`localize`.

    Attributes:
        primary: the model itself, with its own state-dict keys under ``primary.``.
        passage: where it can be cut, and why not elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        rule: Rule,
        what: Task,
        example: Tensor,
        modules: Modules,
        layout: LayoutChoice,
        recompute: Recompute | Sequence[Recompute],
        fused: bool,
        output: str | int | None,
        skips: Skips,
    ) -> None:
        nn.Module.__init__(self)
        names = _names(modules, skips)
        self.passage = find_boundaries(model, example, output, skips)
        _refuse_unused(model, self.passage)
        found = [each for each in self.passage.boundaries if not each.crossing or not names.isdisjoint(each.names)]
        if not found:
            raise ValueError(_nowhere(model, self.passage))
        ends: list[Boundary | None] = [*found, *_before_classifier(model, self.passage, found[-1]), None]
        described, ends = _layers(model, self.passage, ends, example, layout)
        self._ends = tuple(ends)
        layers = nn.Sequential()
        for begin, end in zip([None, *ends[:-1]], ends, strict=True):
            layers._modules["output" if end is None else str(end)] = _between(model, self.passage, begin, end)
        if names:
            assert isinstance(modules, Sequence)
            modules = _named(modules, [end for end in ends if end is not None], len(described.layers), self.passage)
        _compare(model, layers, example, output)
        self._runs: list[Segment] = []
        cuts = cast("int | Sequence[int] | Balanced | None", modules)
        self._wrap(model, layers, described, rule, what, example, cuts, recompute, fused)
        _refuse_lost(model, self.passage, [self._segment(k) for k in range(self.num_modules)])

    def _children(self) -> list[nn.Module]:
        return list(self.network.primary)

    def _followable(self) -> list[nn.Module]:
        return [module for child in self._children() for module in modules_of(child)]

    def _segment(self, k: int) -> Segment:
        if len(self._runs) != self.num_modules:
            begin = None
            for index in self.network.ends:
                end = self._ends[self.network.layers[index].stop - 1]
                self._runs.append(_between(self.primary, self.passage, begin, end))
                begin = end
        return self._runs[k]

    def _infer(self, x: Tensor) -> Tensor:
        return picked_output(self.primary(x), self.passage.output)

    def _copied(self) -> tuple[nn.Module, nn.ModuleDict, Sequence[LocalModule]]:
        runs = [self._segment(k) for k in range(self.num_modules)]
        primary, context, runs = copy.deepcopy((self.primary, self.context, runs))
        modules = [replace(module, segment=run) for module, run in zip(self.local_modules, runs, strict=True)]
        return primary, context, modules


def localize(
    model: nn.Module,
    rule: Rule,
    num_classes: int | None = None,
    modules: Modules = None,
    *,
    task: Task | None = None,
    criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    outputs: int | None = None,
    input_shape: Sequence[int] | None = None,
    example_input: Tensor | None = None,
    layout: LayoutChoice = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    recompute: Recompute | Sequence[Recompute] = "none",
    fused: bool = False,
    output: str | int | None = None,
    skips: Skips = "refuse",
) -> LocalizedModel:
    """Local learning of any model, which stays as it is.

    ::

        model = torchvision.models.convnext_tiny(weights="DEFAULT")
        net = localize(model, DGL(), num_classes=1000, modules=4, input_shape=(3, 224, 224))
        out = net(x, y)        # or LocalStep(net, ...)
        out.loss.backward()
        logits = model(x)      # the model is the user's own

    A local module is a segment of the model's own ``forward``: the code between two submodules. A model can be cut
    after a submodule if exactly one tensor, with the batch first, is needed later; dry runs on fake tensors find these
    places. ``net`` is a :class:`auglocal_ext.LocalSequential` and used like one.

    ``skips="detach"`` also cuts where more than one tensor is needed later, after submodules named in ``modules``:
    across the skip connections of a U-Net or a dense block, or after a submodule that returns a tuple. All tensors
    that cross a cut become inputs of the next local modules, detached. What is learned, and what is not:

    - The local loss of a module sees its output alone: what the named submodule returns, of a tuple the first tensor
      that is needed and can be handed on.
    - Within a local module gradients flow through skip connections as always.
    - Through a cut none flow. What makes a skip connection is not trained by what later local modules do with it. They
      learn to use it as it is.
    - Parameters that would be trained by no loss at all are refused.

    What crosses a cut stays in memory until the last local module that needs it has run. What a forward computes of it
    between submodules is computed again in each local module that needs it.

    Args:
        model: takes one tensor. Neither its class nor its parameters, keys, modes or hooks change.
        rule, num_classes, task, criterion, outputs, input_shape, example_input, layout, label_smoothing, ignore_index,
            recompute: as for :class:`auglocal_ext.LocalSequential`.
        modules: as there, or the names of the submodules that local modules end with, but for the last:
            ``["layer1", "layer2", "layer3"]``. A layer is the finest part between two cuts that has weights.
        fused: as there; it changes the class of the model's parts, so it is off unless asked for.
        output: name or index of what is learned from, where the model returns a dictionary, a dataclass or a tuple.
        skips: ``"refuse"``: one tensor crosses a cut; ``"detach"``: more may, see above.

    Raises:
        TypeError: if ``model`` is no module or is scripted, ``rule`` no rule or ``task`` no task.
        ValueError: if the model cannot be cut where it is asked for, with the name of what crosses; if it does not run
            on fake tensors; if a trainable parameter is used nowhere; or as :class:`auglocal_ext.LocalSequential`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    if is_compiled(model):
        raise TypeError("the model is compiled as a whole: localize the model itself, and compile its blocks")
    if isinstance(model, LocalSequential):
        raise TypeError("the model is wrapped for local learning already: localize its primary")
    if not isinstance(rule, Rule):
        raise TypeError(f"rule must be a learning rule such as AugLocal(depth=6) or DGL(), got {rule!r}")
    what = what_is_learned(num_classes, task, criterion, outputs, label_smoothing, ignore_index)
    if next(model.parameters(), None) is None:
        raise ValueError(f"{type(model).__name__} has no parameters, so there is nothing to train")
    refuse_sharding(model)
    example = one_input(model, input_shape, example_input)
    unfuse(model)
    with _buffers_kept(model):
        return LocalizedModel(model, rule, what, example, modules, layout, recompute, fused, output, skips)


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Undoes what the runs on an example change in buffers, such as a count of calls."""
    held = [(each, 0 if each.is_inference() else version(each), each.clone()) for each in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before, value in held:
                if not buffer.is_inference() and version(buffer) != before:
                    buffer.copy_(value)


def _refuse_unused(model: nn.Module, passage: Passage) -> None:
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    unused = [name for name in passage.unused if name in trainable]
    if unused:
        names = ", ".join(unused[:3]) + (" and others" if len(unused) > 3 else "")
        raise ValueError(
            f"the output does not depend on {names}, which no loss would train: freeze them by requires_grad_(False), "
            "remove them, or say output= if they make another output"
        )


def _names(modules: Modules, skips: Skips) -> frozenset[str]:
    """The submodules named in ``modules``, if any."""
    given = modules if isinstance(modules, Sequence) else ()
    names = frozenset(each for each in given if isinstance(each, str))
    if skips not in get_args(Skips):
        raise ValueError(f'skips must be "refuse" or "detach", got {skips!r}')
    if skips == "detach" and not names:
        raise ValueError(
            'skips="detach" cuts skip connections where you say so: name the submodules that local modules end with, '
            f"modules=[...], got modules={modules!r}. auglocal_ext cuts --skips detach lists them"
        )
    return names


def _before_classifier(model: nn.Module, passage: Passage, last: Boundary) -> list[Boundary]:
    """Where to divide what runs after ``last``, if skip connections cross it: the classifier is no layer by itself."""
    for end in reversed(passage.boundaries[passage.boundaries.index(last) + 1 :] if last.crossing else ()):
        if all(starts_layer(_between(model, passage, *ends)) for ends in ((last, end), (end, None))):
            return [end]
    return []


def _refuse_lost(model: nn.Module, passage: Passage, segments: Sequence[Segment]) -> None:
    """ValueError for parameters that only a detached skip connection depends on: no loss would train them."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for segment in segments:
        begin = 0 if segment.first is None else passage.call(segment.first.key, True).end
        lost = () if segment.last is None else segment.last.lost
        names = [name for name, depends, used in lost if depends < begin <= used and name in trainable]
        if names:
            raise ValueError(
                f"only what crosses the cut after {segment.last}, detached, depends on {', '.join(sorted(names)[:4])}"
                + (" and others" if len(names) > 4 else "")
                + ": no loss would train them. Cut elsewhere, or freeze them by requires_grad_(False)"
            )


def _nowhere(model: nn.Module, passage: Passage) -> str:
    reasons = "; ".join(f"after {each}: {each.refused}" for each in passage.refused[:3])
    way = ""
    if any(each.crossing for each in passage.refused):
        way = '. skips="detach" allows some of these cuts, with no gradient through what crosses: name them by modules='
    reasons = reasons or "It calls no submodule before its last operators"
    return f"{type(model).__name__} can be cut nowhere. {reasons}{way}"


def _layers(
    model: nn.Module, passage: Passage, ends: list[Boundary | None], example: Tensor, layout: LayoutChoice
) -> tuple[Described, list[Boundary | None]]:
    """The layers, each one child of a new sequence, and where these children end; the classifier is the last child."""
    ends = _outermost(passage, group_children(_pieces(model, passage, ends)), ends)
    pieces = _pieces(model, passage, ends)
    described = describe(pieces, example, layout)
    classifier = classifier_start(pieces)
    kept = [ends[layer.stop - 1] for layer in described.layers]
    layers = [replace(layer, start=i, stop=i + 1) for i, layer in enumerate(described.layers)]
    if classifier < len(pieces):
        kept[-1:] = [ends[classifier - 1], None]
        layers[-1] = replace(layers[-1], stop=len(layers) + 1)
    return replace(described, layers=tuple(layers)), kept


def _pieces(model: nn.Module, passage: Passage, ends: list[Boundary | None]) -> nn.Sequential:
    return nn.Sequential(*(_between(model, passage, a, b) for a, b in zip([None, *ends[:-1]], ends, strict=True)))


def _outermost(passage: Passage, ranges: list[tuple[int, int]], ends: list[Boundary | None]) -> list[Boundary | None]:
    """``ends`` without those with which a layer would take the beginning of the next block, such as its first norm.

    Those that something crosses are there because they were asked for; they stay.
    """
    kept: list[Boundary | None] = []
    for start, stop in ranges:
        depths = [0 if end is None else len(list(passage.call(end.key, False).ancestors())) for end in ends[start:stop]]
        asked = [end is not None and bool(end.crossing) for end in ends[start:stop]]
        if any(asked) and stop < len(ends):
            depths = [0 if each else 1 for each in asked]
        last = max(index for index, depth in enumerate(depths) if depth == min(depths))
        kept += ends[start : stop if stop == len(ends) else start + last + 1]
    return kept


def _between(model: nn.Module, passage: Passage, begin: Boundary | None, end: Boundary | None) -> Segment:
    """The segment between two boundaries, with the parameters and buffers that are used in it."""
    return Segment(model, passage, begin, end, *passage.owned(begin, end))


def _compare(model: nn.Module, layers: nn.Sequential, example: Tensor, output: str | int | None) -> None:
    """ValueError unless the segments, one after another, give what the model gives, on five samples in eval mode.

    The dry runs have seen two and three, so that what depends on the batch size otherwise than linearly shows too.
    """
    if any(isinstance(p, FakeTensor) or p.is_meta for p in model.parameters()):
        return  # no values; dry runs have found the boundaries
    x = example.expand(5, *example.shape[1:]).clone()
    if x.is_floating_point():
        generator = torch.Generator(x.device).manual_seed(0)
        x = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    devices = [x.device] if x.is_cuda else []
    with torch.random.fork_rng(devices), evaluating(model):
        wanted, found = picked_output(model(x), output), layers(x)
    # A GPU's libraries may choose other kernels from call to call.
    tolerance = 1e-2 if wanted.is_cuda else 0.0
    if wanted.shape != found.shape or not torch.allclose(wanted, found, tolerance, tolerance, equal_nan=True):
        raise ValueError(
            f"segments of {type(model).__name__} do not give what the model gives: its forward may keep state between "
            "calls, draw random numbers in eval mode, or depend on the batch size otherwise than linearly"
        )


def _named(names: Sequence[object], ends: Sequence[Boundary], layers: int, passage: Passage) -> list[int]:
    """Indices of the layers that end with the submodules of these names."""
    last = {name: index for index, end in enumerate(ends[: layers - 1]) for name in end.names}
    found = []
    for name in names:
        if name not in last:
            places = ", ".join(map(str, ends[: layers - 1])) or "the model alone"
            raise ValueError(
                f"the model cannot be cut after {name!r}: {_why_not(str(name), passage)}. Layers end with {places}"
            )
        found.append(last[str(name)])
    return sorted(found)


def _why_not(name: str, passage: Passage) -> str:
    for each in passage.refused:
        if name in each.names:
            way = '. skips="detach" allows it, with no gradient through what crosses' if each.crossing else ""
            return each.refused + way
    if any(name in each.names for each in passage.boundaries):
        return "it ends within a layer, or with the classifier, which belongs to the last local module"
    return "no call of it ends where something is needed later"

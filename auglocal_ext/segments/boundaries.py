"""Where a model can be cut: after which calls of submodules, and what is needed later of what was made before."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .._torch import COMPILED_CALL, is_compiled
from .calls import Call, Form, Recording
from .dataflow import Crossing, Dataflow
from .recording import record

#: What becomes of tensors that cross a cut beside the one that is handed on, such as skip connections.
Skips = Literal["refuse", "detach"]


@dataclass(frozen=True)
class Boundary:
    """A place after a call of a submodule.

    Attributes:
        name: of the submodule.
        nth: which of its calls, from 0.
        shape: of the tensor that is handed on, without the batch; None where the model cannot be cut.
        bytes: of it, per sample.
        flops: of what runs between the boundary before and this one, per sample.
        refused: why the model cannot be cut here; empty where it can.
        names: all submodules that end here.
        crossing: what crosses beside the tensor that is handed on.
        overwritten: whether that tensor is changed in place later.
        lost: parameters used before it, but for what crosses alone; see ``Dataflow.lost``.
    """

    name: str
    nth: int
    shape: tuple[int, ...] | None
    bytes: int
    flops: int
    refused: str = ""
    names: tuple[str, ...] = ()
    crossing: tuple[Crossing, ...] = ()
    overwritten: bool = False
    lost: tuple[tuple[str, int, int], ...] = ()

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.nth

    def __str__(self) -> str:
        return self.name if self.nth == 0 else f"{self.name} (call {self.nth + 1})"


@dataclass(frozen=True)
class Passage:
    """What the dry runs of a model found; it holds no tensors and refers to submodules by name.

    Attributes:
        recordings: in eval mode and in training mode.
        leaves: in these modes, for each boundary which leaf of its submodule's output crosses.
        boundaries: where the model can be cut, in order.
        refused: where it cannot, with the reason.
        names: of the model's parameters and buffers.
        own: names of those that are used before the first boundary, between two, and after the
            last.
        work: in training mode, which operators compute data.
        unused: parameters that no output depends on.
        changed: buffers that a forward changes, such as BatchNorm's.
        takers: for each parameter and buffer the names of the modules whose forward takes it.
        readouts: in these modes, the call that makes the output; None where more is done with it.
        tail_flops: of what runs after the last boundary, per sample.
        output: what is picked of the model's output.
        input_shape: of one sample.
    """

    recordings: tuple[Recording, Recording]
    leaves: tuple[dict[tuple[str, int], int], dict[tuple[str, int], int]]
    boundaries: tuple[Boundary, ...]
    refused: tuple[Boundary, ...]
    names: tuple[str, ...]
    own: tuple[tuple[str, ...], ...]
    work: tuple[int, ...]
    unused: tuple[str, ...]
    tail_flops: int
    output: str | int | None
    input_shape: tuple[int, ...]
    changed: frozenset[str]
    takers: dict[str, frozenset[str]]
    readouts: tuple[Call | None, Call | None]

    def __deepcopy__(self, memo: Any) -> Passage:
        return self

    def chained(self, first: Boundary | None, last: Boundary | None) -> bool:
        """Whether between two boundaries submodules are called one after another, and nothing else is done.

        Each takes what the one before returned, and nothing else.
        """
        begin = 0 if first is None else self.call(first.key, True).end
        end = self.recordings[True].root.end if last is None else self.call(last.key, True).end
        inside = [call for call in self.recordings[True].root.walk() if begin <= call.start and call.end <= end]
        done = {time for call in inside for time in range(call.start, call.end)}
        if not all(time in done for time in self.work if begin <= time < end):
            return False
        handed = 0 if first is None else self.call(first.key, True).gives[self.leaves[True][first.key]]
        for call in (call for call in inside if call.parent not in inside):
            if call.takes != handed or len(call.gives) != 1:
                return False
            handed = call.gives[0]
        return True

    def _span(self, first: Boundary | None, last: Boundary | None) -> tuple[int, int]:
        start = 0 if first is None else self.boundaries.index(first) + 1
        return start, len(self.boundaries) if last is None else self.boundaries.index(last)

    def between(self, first: Boundary | None, last: Boundary | None) -> tuple[Boundary, ...]:
        """The boundaries between two others."""
        start, stop = self._span(first, last)
        return self.boundaries[start:stop]

    def owned(self, first: Boundary | None, last: Boundary | None) -> tuple[tuple[str, ...], frozenset[str]]:
        """Names of the tensors used between two boundaries, and those of them that are used elsewhere too."""
        start, stop = self._span(first, last)
        inside = {name for own in self.own[start : stop + 1] for name in own}
        outside = {name for own in (*self.own[:start], *self.own[stop + 1 :]) for name in own}
        return tuple(name for name in self.names if name in inside), frozenset(inside & outside)

    def call(self, key: tuple[str, int], training: bool) -> Call:
        return next(call for call in self.recordings[training].root.walk() if call.key == key)


def find_boundaries(
    model: nn.Module, example: Tensor, output: str | int | None = None, skips: Skips = "refuse"
) -> Passage:
    """Every place where ``model`` can be cut, found by dry runs in eval and in training mode.

    Args:
        example: one input, ``(1, ...)``.
        output: name or index of what is learned from, where the model returns more than one tensor.
        skips: whether places count at which more than one tensor is needed later.

    Raises:
        ValueError: if the model cannot be run on fake tensors.
        TypeError: for a scripted model.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{name or 'the model'} is a scripted module, whose calls cannot be followed")
    recordings = record(model, example, False, output), record(model, example, True, output)
    parameters = frozenset(name for name, _ in model.named_parameters())
    flows = [Dataflow(recording, parameters) for recording in recordings]
    for flow in flows:
        flow.refuse_reentrant()
    compiled = frozenset(name for name, module in model.named_modules() if runs_compiled(module))
    found: dict[tuple[str, int], Boundary] = {}
    for group in flows[0].groups():
        made = [_boundary(call, flows, compiled, skips) for call in group]
        fit = [each for each in made if not each.refused]
        fit = [each for each in fit if not each.crossing] or fit
        best = (fit or [each for each in made if each.crossing] or made)[-1]  # the outermost: its name is the shortest
        names = tuple(each.name for each in fit or made)
        found[best.key] = replace(best, names=names)
    places = sorted(found.values(), key=lambda each: flows[0].call(each.key).end)
    legal = tuple(each for each in places if not each.refused)
    ends = [[flow.call(each.key).end for each in legal] for flow in flows]
    flops = flows[1].flops(ends[1])  # in eval mode attention may be one operator, which is not counted
    legal = tuple(replace(each, flops=count) for each, count in zip(legal, flops[:-1], strict=True))
    own, unused = _owners(model, flows, ends)
    work = tuple(flows[1].work)
    changed, takers = _changed(recordings), _takers(recordings)
    leaves = [{each.key: flow.crossings(flow.call(each.key)).leaf for each in legal} for flow in flows]
    legal = tuple(_completed(each, flows, leaves) for each in legal)
    readouts = flows[0].readout(), flows[1].readout()
    for recording in recordings:  # what was needed for this alone, and is large
        recording.operators = []
    return Passage(
        recordings,
        (leaves[0], leaves[1]),
        legal,
        tuple(each for each in places if each.refused),
        (*(name for name, _ in model.named_parameters()), *(name for name, _ in model.named_buffers())),
        own,
        work,
        unused,
        flops[-1],
        output,
        tuple(example.shape[1:]),
        changed,
        takers,
        readouts,
    )


def _changed(recordings: Sequence[Recording]) -> frozenset[str]:
    """Names of the buffers that a run has written to or replaced."""
    names: set[str] = set()
    for recording in recordings:
        for call in (recording.root, *recording.root.walk()):
            names.update(f"{call.name}.{key}".lstrip(".") for key in call.assigns)
        for operator in recording.operators:
            # Some of BatchNorm's operators do not say which of their arguments they write to.
            names |= operator.own if "batch_norm" in operator.name else operator.writes
    return frozenset(names)


def _takers(recordings: Sequence[Recording]) -> dict[str, frozenset[str]]:
    takers: dict[str, set[str]] = {}
    for recording in recordings:
        for operator in recording.operators:
            for name in operator.own:
                takers.setdefault(name, set()).add(operator.caller)
    return {name: frozenset(callers) for name, callers in takers.items()}


def runs_compiled(module: nn.Module) -> bool:
    """Whether the module, or what it wraps, is compiled."""
    return is_compiled(module) or module.__dict__.get(COMPILED_CALL) is not None


def _boundary(call: Call, flows: Sequence[Dataflow], compiled: frozenset[str], skips: Skips) -> Boundary:
    several = refused = ""
    found = []
    for flow in flows:
        if not flow.has(call.key):
            refused = refused or "it is not called in training mode"
            continue
        same = flow.call(call.key)
        found.append(flow.crossings(same))
        several = several or found[-1].several
        refused = refused or found[-1].refused or flow.changed(same)
    if not refused and len({each.beside for each in found}) > 1:
        refused = "other tensors cross it in training mode than in eval mode"
    form = None
    if not refused:
        form = call.leaves[found[0].leaf]
        assert isinstance(form, Form)
        refused = _unfit(call, form, flows[0], compiled)
    crossing = () if refused else found[0].beside
    if several and skips == "refuse":
        refused = several
    shape = None if refused or form is None else form.per_sample
    size = 0 if shape is None or form is None else prod(shape) * form.dtype.itemsize
    return Boundary(call.name, call.nth, shape, size, 0, refused, crossing=crossing)


def _completed(boundary: Boundary, flows: Sequence[Dataflow], leaves: Sequence[dict[tuple[str, int], int]]) -> Boundary:
    key = boundary.key
    overwritten = any(flow.overwritten(flow.call(key), of[key]) for flow, of in zip(flows, leaves, strict=True))
    lost = flows[1].lost(flows[1].call(key), leaves[1][key]) if boundary.crossing else ()
    return replace(boundary, overwritten=overwritten, lost=lost)


def _unfit(call: Call, form: Form, flow: Dataflow, compiled: frozenset[str]) -> str:
    """Why no segment can end and begin after ``call``, by what it returns and by what is around it."""
    if not form.dtype.is_floating_point:
        return f"what crosses it is in {form.dtype}"
    if form.per_sample is None:
        sizes = ", ".join("N" if each.each and not each.fixed else "*" if each.each else str(each.fixed)
                          for each in form.sizes)  # fmt: skip
        return f"what crosses it, ({sizes}), does not have the batch as its first axis alone"
    if not form.per_sample:
        return "what crosses it is one number per sample"
    if call.opaque:
        return f"it returns {call.opaque}"
    for around in call.ancestors():
        if around.name in compiled:
            return f"it lies in {around.name or 'the model'}, which is compiled"
        if around.checkpointed != "no":
            return f"it lies in {around.name}, which torch.utils.checkpoint runs"
    if call.checkpointed == "with others":
        return "torch.utils.checkpoint runs it together with others"
    for before in flow.recording.root.walk():
        if before.end <= call.end and before.opaque and before.data and before not in call.ancestors():
            return f"{before.name} before it returns {before.opaque}, which a segment cannot do without"
    return ""


def _owners(
    model: nn.Module, flows: Sequence[Dataflow], ends: Sequence[Sequence[int]]
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Names of what each piece uses: parameters where they meet data, buffers also where an operator takes them."""
    parameters = [name for name, _ in model.named_parameters()]
    buffers = [name for name, _ in model.named_buffers()]
    used: list[set[str]] = [set() for _ in range(len(ends[0]) + 1)]
    for flow, at in zip(flows, ends, strict=True):
        for time, operator in enumerate(flow.recording.operators):
            piece = used[bisect_right(at, time)]
            if flow.needed[time]:
                piece |= operator.meets
            piece |= operator.own.intersection(buffers)
    anywhere = set().union(*used)
    used[0] |= {name for name in (*parameters, *buffers) if name not in anywhere}
    order = {name: index for index, name in enumerate((*parameters, *buffers))}
    unused = tuple(name for name in parameters if name not in anywhere)
    return tuple(tuple(sorted(piece, key=order.__getitem__)) for piece in used), unused

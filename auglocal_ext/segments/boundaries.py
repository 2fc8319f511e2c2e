"""Where a model can be cut: behind which calls of submodules exactly one tensor is needed later."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .recording import SLOT, Call, Form, Recording, record


@dataclass(frozen=True)
class Boundary:
    """A place behind a call of a submodule.

    Attributes:
        name: of the submodule.
        nth: which of its calls, from 0.
        shape: of the tensor that crosses, without the batch; None where several do, or none.
        bytes: of it, per sample.
        flops: of what runs between the boundary before and this one, per sample.
        refused: why the model cannot be cut here; empty where it can.
        names: all submodules that end here.
    """

    name: str
    nth: int
    shape: tuple[int, ...] | None
    bytes: int
    flops: int
    refused: str = ""
    names: tuple[str, ...] = ()

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
        tail_flops: of what runs behind the last boundary, per sample.
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

    def __deepcopy__(self, memo: Any) -> Passage:
        return self

    def chained(self, first: Boundary | None, last: Boundary | None) -> bool:
        """Whether between two boundaries submodules are called one after another, and nothing else is done."""
        begin = 0 if first is None else self.call(first.key, True).end
        end = self.recordings[True].root.end if last is None else self.call(last.key, True).end
        inside = [call for call in self.recordings[True].root.walk() if begin <= call.start and call.end <= end]
        done = {time for call in inside for time in range(call.start, call.end)}
        return all(time in done for time in self.work if begin <= time < end)

    def call(self, key: tuple[str, int], training: bool) -> Call:
        return next(call for call in self.recordings[training].root.walk() if call.key == key)


def find_boundaries(model: nn.Module, example: Tensor, output: str | int | None = None) -> Passage:
    """Every place where ``model`` can be cut, found by dry runs in eval and in training mode.

    Args:
        example: one input, ``(1, ...)``.
        output: name or index of what is learned from, where the model returns more than one tensor.

    Raises:
        ValueError: if the model cannot be run on fake tensors.
        TypeError: for a scripted model.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{name or 'the model'} is a scripted module, whose calls cannot be followed")
    recordings = record(model, example, False, output), record(model, example, True, output)
    looks = [_Look(recording) for recording in recordings]
    for look in looks:
        look.refuse_reentrant()
    compiled = frozenset(name for name, module in model.named_modules() if _is_compiled(module))
    found: dict[tuple[str, int], Boundary] = {}
    for group in looks[0].groups():
        made = [_boundary(call, looks, compiled) for call in group]
        fit = [each for each in made if not each.refused] or made
        best = fit[-1]  # the outermost: its name is the shortest
        names = tuple(each.name for each in fit)
        found[best.key] = replace(best, names=names)
    places = sorted(found.values(), key=lambda each: looks[0].call(each.key).end)
    legal = tuple(each for each in places if not each.refused)
    ends = [[look.call(each.key).end for each in legal] for look in looks]
    flops = looks[1].flops(ends[1])  # in eval mode attention may be one operator, which is not counted
    legal = tuple(replace(each, flops=count) for each, count in zip(legal, flops[:-1], strict=True))
    own, unused = _owners(model, looks, ends)
    work = tuple(looks[1].work)
    leaves = [{each.key: crossing_leaf(look.call(each.key), look) for each in legal} for look in looks]
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
    )


def _is_compiled(module: nn.Module) -> bool:
    return isinstance(module, torch._dynamo.OptimizedModule) or module.__dict__.get(SLOT) is not None


class _Look:
    """A recording, with what of it the output depends on."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        operators = recording.operators
        self._calls = {call.key: call for call in recording.root.walk()}
        needed = {recording.output}
        self.needed = [False] * len(operators)
        for time in range(len(operators) - 1, -1, -1):
            if not needed.isdisjoint(operators[time].outputs):
                self.needed[time] = True
                needed.update(operators[time].inputs)
        self._made: dict[int, int] = {0: -1}
        self._used: dict[int, int] = {recording.output: len(operators)}
        for time, operator in enumerate(operators):
            for number in operator.outputs:
                self._made.setdefault(number, time)
            if self.needed[time]:
                for number in operator.inputs:
                    self._used[number] = max(self._used.get(number, -1), time)
        # Numbers of operators that do something, to tell places between which nothing happens.
        self.work = [time for time, each in enumerate(operators) if each.data and not each.mark]

    def call(self, key: tuple[str, int]) -> Call:
        return self._calls[key]

    def has(self, key: tuple[str, int]) -> bool:
        return key in self._calls

    def refuse_reentrant(self) -> None:
        for call in self.recording.root.walk():
            if call.checkpointed == "reentrant":
                raise ValueError(
                    f"{call.name} runs in torch.utils.checkpoint(use_reentrant=True), which gives no gradients where "
                    "the input requires none, as that of a local module: use use_reentrant=False"
                )

    def groups(self) -> list[list[Call]]:
        """Calls that return data, in order; those between which nothing happens together, the innermost first."""
        calls = [call for call in self.recording.root.walk() if call.data and any(n >= 0 for n in call.outputs)]
        calls.sort(key=lambda call: (call.end, -call.start))
        groups: dict[int, list[Call]] = {}
        for call in calls:
            done = bisect_right(self.work, call.end - 1)
            if 0 < done < len(self.work):  # before the first and behind the last there is nothing to run
                groups.setdefault(done, []).append(call)
        return list(groups.values())

    def live(self, time: int) -> list[int]:
        """Data made before ``time`` that is needed from then on."""
        return [
            number
            for number, used in self._used.items()
            if used >= time > self._made.get(number, len(self.needed)) and number in self.recording.data
        ]

    def crossing(self, call: Call) -> str:
        """Why exactly one tensor does not cross the place behind ``call``; empty where it does."""
        live = self.live(call.end)
        outputs = [number for number in live if number in call.outputs]
        others = [number for number in live if number not in call.outputs]
        if others:
            number = min(others, key=lambda each: self._made[each])
            return f"{self._maker(number)}, which {self._user(number, call.end)} uses later, crosses it"
        if len(outputs) != 1:
            return f"{len(outputs)} tensors cross it" if outputs else "nothing of its output is needed"
        return ""

    def changed(self, call: Call) -> str:
        """What a module around ``call`` changes before it, and would change again in the next segment."""
        around = {each.name for each in call.ancestors()}
        for outer in call.ancestors():
            if outer.assigns:
                return f"{outer.name or 'the model'} around it replaces its buffer {outer.assigns[0]}"
        for operator in self.recording.operators[: call.end]:
            if operator.writes and operator.caller in around:
                return (
                    f"{operator.caller or 'the model'} around it changes {', '.join(sorted(operator.writes))} before it"
                )
        return ""

    def _maker(self, number: int) -> str:
        time = self._made[number]
        if time < 0:
            return "the model's input"
        return f"the output of {self._where(time)}"

    def _user(self, number: int, since: int) -> str:
        for time, operator in enumerate(self.recording.operators[since:], since):
            if self.needed[time] and number in operator.inputs:
                return self._where(time)
        return "the model's output"

    def _where(self, time: int) -> str:
        operator = self.recording.operators[time]
        if operator.mark:
            return operator.caller or "the model"
        return f"{operator.name} in {operator.caller or 'the forward of the model'}"

    def flops(self, ends: Sequence[int]) -> list[int]:
        """Of one sample, before the first of ``ends``, between them, and after the last."""
        totals = [0] * (len(ends) + 1)
        for time, operator in enumerate(self.recording.operators):
            totals[bisect_right(ends, time)] += operator.flops
        return [total // 2 for total in totals]


def _boundary(call: Call, looks: Sequence[_Look], compiled: frozenset[str]) -> Boundary:
    refused = ""
    for look in looks:
        if not look.has(call.key):
            refused = refused or "it is not called in training mode"
        else:
            refused = refused or look.crossing(look.call(call.key)) or look.changed(look.call(call.key))
    form = None
    if not refused:
        form = crossing_form(call, looks[0])
        refused = _unfit(call, form, looks[0], compiled)
    shape = None if form is None else form.per_sample
    size = 0 if shape is None or form is None else prod(shape) * form.dtype.itemsize
    return Boundary(call.name, call.nth, shape, size, 0, refused)


def crossing_leaf(call: Call, look: _Look) -> int:
    live = set(look.live(call.end))
    return next(index for index, number in enumerate(call.outputs) if number in live)


def crossing_form(call: Call, look: _Look) -> Form:
    form = call.leaves[crossing_leaf(call, look)]
    assert isinstance(form, Form)
    return form


def _unfit(call: Call, form: Form, look: _Look, compiled: frozenset[str]) -> str:
    """Why no segment can end and begin behind ``call``, by what it returns and by what is around it."""
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
    for before in look.recording.root.walk():
        if before.end <= call.end and before.opaque and before.data and before not in call.ancestors():
            return f"{before.name} before it returns {before.opaque}, which a segment cannot do without"
    return ""


def _owners(
    model: nn.Module, looks: Sequence[_Look], ends: Sequence[Sequence[int]]
) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Names of what each piece uses: parameters where they meet data, buffers also where an operator takes them."""
    parameters = [name for name, _ in model.named_parameters()]
    buffers = [name for name, _ in model.named_buffers()]
    used: list[set[str]] = [set() for _ in range(len(ends[0]) + 1)]
    for look, at in zip(looks, ends, strict=True):
        for time, operator in enumerate(look.recording.operators):
            piece = used[bisect_right(at, time)]
            if look.needed[time]:
                piece |= operator.meets
            piece |= operator.own.intersection(buffers)
    anywhere = set().union(*used)
    used[0] |= {name for name in (*parameters, *buffers) if name not in anywhere}
    order = {name: index for index, name in enumerate((*parameters, *buffers))}
    unused = tuple(name for name in parameters if name not in anywhere)
    return tuple(tuple(sorted(piece, key=order.__getitem__)) for piece in used), unused

"""A dry run, with what of it the output depends on: which tensors are needed after a call, and who made them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from .calls import Call, Form, Recording


@dataclass(frozen=True)
class Crossing:
    """A tensor that crosses a boundary beside the boundary's own: what a call returned, or the model's input.

    Attributes:
        name: of the submodule; empty for the model's input.
        nth: which of its calls.
        leaf: which tensor of what it returned.
        shape: without the batch; None where the batch is not the first axis.
        bytes: per sample.
    """

    name: str
    nth: int
    leaf: int
    shape: tuple[int, ...] | None
    bytes: int

    @property
    def key(self) -> tuple[str, int, int]:
        return self.name, self.nth, self.leaf

    def __str__(self) -> str:
        if not self.name:
            return "the input"
        return self.name if self.nth == 0 else f"{self.name} (call {self.nth + 1})"


@dataclass(frozen=True)
class Crossings:
    """What crosses the place after a call.

    Attributes:
        leaf: which leaf of the call's output is the tensor of the boundary; -1: none.
        beside: what crosses beside it.
        several: why that is not one tensor; empty where it is.
        refused: why the model cannot be cut here although skip connections may be.
    """

    leaf: int
    beside: tuple[Crossing, ...] = ()
    several: str = ""
    refused: str = ""


class Dataflow:
    """A recording, with what of it the output depends on.

    Args:
        recording: with its operators.
        parameters: names of the model's.
    """

    def __init__(self, recording: Recording, parameters: frozenset[str]) -> None:
        self.recording = recording
        self._changing = parameters.union(*(operator.writes for operator in recording.operators))
        operators = recording.operators
        self._calls = {call.key: call for call in recording.root.walk()}
        self._returned = {number: call for call in self._calls.values() for number in call.outputs if number >= 0}
        needed = {recording.output}
        self.needed = [False] * len(operators)
        for time in range(len(operators) - 1, -1, -1):
            if not needed.isdisjoint(operators[time].outputs):
                self.needed[time] = True
                needed.update(operators[time].inputs)
        self._made: dict[int, int] = {0: -1}
        self._used: dict[int, int] = {recording.output: len(operators)}
        self._outputs_at: dict[int, list[int]] = {}
        for time, operator in enumerate(operators):
            for number in operator.outputs:
                self._made.setdefault(number, time)
                self._outputs_at.setdefault(number, []).append(time)
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
            if 0 < done < len(self.work):  # before the first and after the last there is nothing to run
                groups.setdefault(done, []).append(call)
        return list(groups.values())

    def live(self, time: int) -> list[int]:
        """Data made before ``time`` that is needed from then on."""
        return [
            number
            for number, used in self._used.items()
            if used >= time > self._made.get(number, len(self.needed)) and number in self.recording.data
        ]

    def crossings(self, call: Call) -> Crossings:
        """What crosses the place after ``call``; of several tensors the first of its own output is the boundary's."""
        live = self.live(call.end)
        outputs = [index for index, number in enumerate(call.outputs) if number in live]
        others = [number for number in live if number not in call.outputs]
        several = ""
        if others:
            number = min(others, key=lambda each: self._made[each])
            several = f"{self._maker(number)}, which {self._user(number, call.end)} uses later, crosses it"
        elif len(outputs) != 1:
            several = f"{len(outputs)} tensors cross it" if outputs else "nothing of its output is needed"
        if not several:
            return Crossings(outputs[0])
        if not outputs:
            return Crossings(-1, (), several, several)
        fit = [index for index in outputs if _fit(call.leaves[index])]
        own = (fit or outputs)[0]
        beside = {call.outputs[index] for index in outputs if index != own}.union(others) - {call.outputs[own]}
        found: dict[int, Crossing] = {}
        for number in sorted(beside, key=lambda each: self._made[each]):
            refused = self._trace_back(number, call, found)
            if refused:
                return Crossings(own, (), several, refused)
        found.pop(call.outputs[own], None)
        return Crossings(own, tuple(found[number] for number in sorted(found, key=lambda n: self._made[n])), several)

    def _trace_back(self, number: int, call: Call, found: dict[int, Crossing]) -> str:
        """Adds what a segment after ``call`` must be given so that the model's own code makes tensor ``number`` again.

        That is what submodules return, or the model's input. What the forwards around ``call`` compute of it between
        submodules, each segment that needs it computes anew. Returns why that is impossible; empty where it is not.
        """
        around = list(call.ancestors())
        names = {each.name for each in around}
        rest, seen = [number], {number}
        while rest:
            number = rest.pop()
            time = self._made[number]
            written = self._written_since(number, time)
            if written is not None:
                return f"{self._maker(number)} crosses it and is changed in place by {self._where(written)}"
            if time < 0:
                form = self.recording.input
                found[number] = Crossing("", 0, 0, form.per_sample, form.bytes(1))
                continue
            operator = self.recording.operators[time]
            if operator.mark:
                maker = self._returned[number]
                if maker.parent not in around:
                    keeper = maker.name if maker.parent is None else maker.parent.name
                    return f"{self._maker(number)} crosses it, which {keeper} keeps and does not return"
                leaf = maker.outputs.index(number)
                form = maker.leaves[leaf]
                found[number] = Crossing(*maker.returned(leaf), form.per_sample, form.bytes(1))
                continue
            if operator.caller not in names:
                return f"{self._maker(number)} crosses it, which {operator.caller} keeps and does not return"
            changing = sorted(operator.meets & self._changing)
            if changing:
                return (
                    f"{self._maker(number)} crosses it and would be computed again from {changing[0]}, "
                    "which a training step changes"
                )
            if operator.random:
                return f"{self._maker(number)} crosses it, which is random and would be drawn again"
            inputs = [each for each in operator.inputs if each in self.recording.data and each not in seen]
            rest += inputs
            seen.update(inputs)
        return ""

    def _written_since(self, number: int, time: int) -> int | None:
        return next((each for each in self._outputs_at.get(number, ()) if each > time), None)

    def overwritten(self, call: Call, leaf: int) -> bool:
        """Whether the tensor that crosses after ``call`` is changed in place later."""
        return any(time >= call.end for time in self._outputs_at[call.outputs[leaf]])

    def lost(self, call: Call, leaf: int) -> tuple[tuple[str, int, int], ...]:
        """Parameters used before the end of ``call`` on which its output does not depend by their last use.

        Each with the last time at which the output depends on it, or -1, and that of its last use.
        """
        needed = {call.outputs[leaf]}
        used: dict[str, int] = {}
        last: dict[str, int] = {}
        for time in range(call.end - 1, -1, -1):
            operator = self.recording.operators[time]
            depends = not needed.isdisjoint(operator.outputs)
            if depends:
                needed.update(operator.inputs)
            for name in operator.meets if self.needed[time] else ():
                used.setdefault(name, time)
                if depends:
                    last.setdefault(name, time)
        return tuple((name, last.get(name, -1), time) for name, time in used.items() if last.get(name, -1) < time)

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

    def readout(self) -> Call | None:
        """The call that makes the model's output, its module's only one, if no operator does anything with it later."""
        calls = [self.recording.root, *self.recording.root.walk()]
        first = {after: before for call in calls for after, before in zip(call.outputs, call.gives, strict=True)}
        made = first.get(self.recording.output, self.recording.output)
        within = [call for call in calls if call.start <= self._made.get(made, -1) < call.end]
        if not within or any(call.checkpointed != "no" for call in within):
            return None
        alone = within[-1].gives == [made] and [call.name for call in calls].count(within[-1].name) == 1
        used = any(first.get(n, n) == made for each in self.recording.operators if not each.mark for n in each.inputs)
        return within[-1] if alone and not used else None

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


def _fit(leaf: object) -> bool:
    """Whether a local module can hand on a tensor like this as its output: floating point, with the batch first."""
    return isinstance(leaf, Form) and leaf.dtype.is_floating_point and bool(leaf.per_sample)

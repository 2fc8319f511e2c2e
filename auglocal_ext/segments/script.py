"""What each submodule of a model does in a segment, call by call: run, return ghosts, or end the segment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from ..nn import eager_type
from .boundaries import Boundary, Passage
from .calls import Call


@dataclass(frozen=True)
class _Children:
    """Those children of a partly run ``nn.Sequential`` that belong to a segment.

    Attributes:
        start, stop: they are ``start .. stop - 1``.
        given: whether the segment begins right before the first of them.
        ends: whether it ends after the last.
    """

    start: int
    stop: int
    given: bool
    ends: bool


@dataclass(frozen=True)
class Action:
    """What one call of a submodule does while a segment runs.

    Attributes:
        does: "run": as always; "skip": returns what the segment is given of its output, and ghosts; "stop": runs, and
            ends the segment.
        call: as recorded.
        children: what it runs of an ``nn.Sequential``; None: all.
    """

    does: Literal["run", "skip", "stop"]
    call: Call
    children: _Children | None = None

    @property
    def as_always(self) -> bool:
        return self.does == "run" and self.children is None


class Script:
    """What each submodule does in a segment, call by call, in one mode of the model; never changed once made."""

    def __init__(
        self, model: nn.Module, passage: Passage, ends: tuple[Boundary | None, Boundary | None], training: bool
    ) -> None:
        self.actions: dict[str, list[Action]] = {}
        #: Names of the outermost submodules that run from beginning to end.
        self.whole: list[str] = []
        #: Names of those that are entered, but do not run from beginning to end; the model itself first.
        self.partly: list[str] = []
        #: Names of all whose code runs.
        self.runs: set[str] = set()
        recording = passage.recordings[training]
        self.first, self.last = (None if end is None else passage.call(end.key, training) for end in ends)
        leaves = passage.leaves[training]
        #: Which leaf of which call, for all tensors that the segment takes and returns; its input and output first.
        self.takes, self.returns = (
            [("", 0, 0)] if end is None else [(*end.key, leaves[end.key]), *(each.key for each in end.crossing)]
            for end in ends
        )
        #: Of calls, the leaves of their output that the segment returns beside its own.
        self.keeps: dict[tuple[str, int], list[int]] = {}
        for name, nth, leaf in self.returns[1:]:
            self.keeps.setdefault((name, nth), []).append(leaf)
        self.input = recording.input
        #: The call that makes the output of a segment in which the model ends; None where more is done with it.
        self.readout = passage.readouts[training] if self.last is None else None
        self._begun, self._done = self.first is None, False
        self._partly(model, recording.root, "run")
        kept = {name for name, _ in self.keeps}
        skipping = {n for n, does in self.actions.items() if n in kept or not all(each.as_always for each in does)}
        self.actions = {name: does for name, does in self.actions.items() if name in skipping}

    def __deepcopy__(self, memo: Any) -> Script:
        return self

    def _add(self, action: Action) -> None:
        self.actions.setdefault(action.call.name, []).append(action)

    def _child(self, model: nn.Module, child: Call, contained: bool) -> None:
        """Adds what ``child`` does, a call within one that runs in part.

        ``contained``: a container makes it, which ends the segment after its last child.
        """
        begins_inside = not self._begun and self.first is not None and child in self.first.ancestors()
        ends_inside = self.last is not None and child in self.last.ancestors()
        does: Literal["run", "stop"] = "stop" if child is self.last and not contained else "run"
        if child is self.first:
            self._add(Action("skip", child))
            self._begun = True
        elif begins_inside or ends_inside:
            self._partly(model, child, does)
        elif not self._begun and child.data:
            self._add(Action("skip", child))
        else:
            if self._begun:
                self.whole.append(child.name)
            self._entirely(child, does)
        self._done = self._done or child is self.last

    def _entirely(self, call: Call, does: Literal["run", "stop"]) -> None:
        self._add(Action(does, call))
        self.runs.add(call.name)
        for inside in call.walk():
            self._add(Action("run", inside))
            self.runs.add(inside.name)

    def _partly(self, model: nn.Module, call: Call, does: Literal["run", "stop"]) -> None:
        children = self._children(model, call)
        self.partly.append(call.name)
        self.runs.add(call.name)
        self._add(Action(does, call, children))
        inside = call.children
        if children is not None:
            self._begun = self._begun or children.given
            inside = inside[children.start : children.stop]
        for child in inside:
            if self._done:
                return
            self._child(model, child, children is not None)

    def _children(self, model: nn.Module, call: Call) -> _Children | None:
        """Which children a partly run ``nn.Sequential`` calls; None for other modules."""
        module = model.get_submodule(call.name)
        if not isinstance(module, nn.Sequential) or eager_type(module).forward is not nn.Sequential.forward:
            return None
        if "forward" in vars(module):  # a forward of the user's own
            return None
        called = [model.get_submodule(child.name) for child in call.children]
        if len(called) != len(module) or any(a is not b for a, b in zip(called, module, strict=True)):
            return None
        first = None if self.first is None else (self.first, *self.first.ancestors())
        last = () if self.last is None else (self.last, *self.last.ancestors())
        start, stop, given = 0, len(called), False
        if not self._begun and first is not None:
            start = next(i for i, child in enumerate(call.children) if child in first)
            given = call.children[start] is self.first
        ending = [i for i, child in enumerate(call.children) if child in last]
        if ending and call is not self.last:
            stop = ending[0] + 1
        ends = bool(ending) and call.children[ending[0]] is self.last and not (given and ending[0] == start)
        return _Children(start + given, stop, given, ends)

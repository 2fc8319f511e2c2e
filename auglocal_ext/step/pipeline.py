"""A step over stages: what each of this process's stages takes in, trains on and hands on.

One process among several has one stage. A process that replays such a run has all of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from ..distributed import Shards, Stage, crossing_inputs
from ..local_modules import LocalModule, LocalOutput, OneStream, PassModule, Relay, local_pass
from ..tasks import Task
from .course import Batch, Course
from .edges import Edges
from .updates import Updates, updating


class DelayedOutput(LocalOutput):
    """Result of a step with ``delay``, in which stages train on different batches.

    Losses and counts are those of the batch that each module has trained on. While a run begins or is drained, modules
    that trained on nothing have a loss of NaN and a count of -1, and so :attr:`loss`, the sum, is NaN.

    Attributes:
        target: the targets of :attr:`output`, both of the batch that the last of these modules trained on, which is an
            earlier one than the batch of the call; without samples if it trained on nothing.
    """

    target: Tensor


class Boundaries(Protocol):
    """How features go from one stage to the next."""

    def given(self, batch: Batch) -> None:
        """The stages are given a batch."""
        ...

    def fill(self, stage: int, before: Batch) -> None:
        """The stage trains on nothing yet, and the one before it sends the features of ``before`` in this call."""
        ...

    def receive(self, stage: int, batch: Batch, before: Batch | None) -> tuple[Tensor, list[Tensor | None]]:
        """Input of the stage's first module, and inputs of earlier modules; ``before``: see :meth:`fill`."""
        ...

    def send(self, stage: int, h: Tensor, history: Sequence[Tensor | None]) -> None:
        """The stage's last module has made its output."""
        ...

    def in_flight(self, stage: int, sizes: Sequence[int]) -> list[list[Tensor]]:
        """Features that the stage is still to receive, of so many samples: each with the inputs that cross the cut."""
        ...

    def restart(self, left: tuple[int, int], in_flight: Mapping[int, list[list[Tensor]]]) -> None:
        """End the run, and begin the next with what :meth:`in_flight` returned, by stage.

        ``left``: how many batches of features were sent and not received, to the first stage here and by the last.
        """


class Sent:
    """Boundaries to other processes."""

    def __init__(self, stage: Stage, device: torch.device) -> None:
        self._stage, self._device = stage, device

    def given(self, batch: Batch) -> None:
        self._stage.given(len(batch[0]))

    def fill(self, stage: int, before: Batch) -> None:
        self._stage.fill(len(before[0]), before[0].device)

    def receive(self, stage: int, batch: Batch, before: Batch | None) -> tuple[Tensor, list[Tensor | None]]:
        self._stage.note(*batch)
        return self._stage.receive(batch[0], sent=None if before is None else len(before[0]))

    def send(self, stage: int, h: Tensor, history: Sequence[Tensor | None]) -> None:
        self._stage.send(h, history)

    def in_flight(self, stage: int, sizes: Sequence[int]) -> list[list[Tensor]]:
        return self._stage.in_flight(sizes)

    def restart(self, left: tuple[int, int], in_flight: Mapping[int, list[list[Tensor]]]) -> None:
        self._stage.close(self._device, left)
        self._stage.resume(in_flight.get(self._stage.index, []))


class Queued:
    """Boundaries within this process.

    Args:
        cuts: the first local module of every stage but the first.
        kept: for each local module the module inputs, by index, that modules after it are supplied with.
    """

    def __init__(self, cuts: Sequence[int], kept: Sequence[frozenset[int]]) -> None:
        self._firsts = (0, *cuts)
        self._inputs = [crossing_inputs(kept, first) if first else [] for first in self._firsts]
        self._rows: list[deque[list[Tensor]]] = [deque() for _ in self._firsts]

    def given(self, batch: Batch) -> None:
        pass

    def fill(self, stage: int, before: Batch) -> None:
        pass

    def receive(self, stage: int, batch: Batch, before: Batch | None) -> tuple[Tensor, list[Tensor | None]]:
        if stage == 0:
            return batch[0], []
        h, *inputs = self._rows[stage].popleft()
        history: list[Tensor | None] = [None] * self._firsts[stage]
        history[0] = batch[0]
        for index, tensor in zip(self._inputs[stage], inputs, strict=True):
            history[index] = tensor
        return h, history

    def send(self, stage: int, h: Tensor, history: Sequence[Tensor | None]) -> None:
        if stage + 1 < len(self._rows):
            inputs = [history[index] for index in self._inputs[stage + 1]]
            self._rows[stage + 1].append([h, *(tensor for tensor in inputs if tensor is not None)])

    def in_flight(self, stage: int, sizes: Sequence[int]) -> list[list[Tensor]]:
        return list(self._rows[stage])

    def restart(self, left: tuple[int, int], in_flight: Mapping[int, list[list[Tensor]]]) -> None:
        for stage, row in enumerate(self._rows):
            row.clear()
            row.extend(in_flight.get(stage, []))


class Pipeline:
    """The stages of this process in a run.

    Args:
        stages: of this process: number, first and last local module.
        count: of all stages.
        delay: calls from making features to training on them.
        boundaries: what the stages receive and send.
        edges: parameters that cross cuts.
        region: entered for each stage; takes the number of samples it trains on, and the number of the call.
        task: of the network.
        shards: hold the parameters of this process's modules, if they are sharded.
    """

    def __init__(
        self,
        stages: Sequence[tuple[int, int, int]],
        count: int,
        delay: int,
        boundaries: Boundaries,
        edges: Edges | None,
        region: Callable[[int, int], AbstractContextManager[Any]],
        task: Task,
        shards: Shards | None = None,
    ) -> None:
        self.course = Course(delay, stages[-1][0])
        self.count = count
        self._stages = stages
        self._boundaries = boundaries
        self._edges = edges
        self._region = region
        self._task = task
        self._shards = shards

    def run(
        self,
        modules: Sequence[LocalModule],
        batch: Batch | None,
        updates: Updates,
        autocast: torch.dtype | None,
        like: Tensor,
    ) -> LocalOutput:
        """One call.

        Args:
            modules: of this process.
            batch: that the stages are given; None at the end of a run.
            like: a parameter, of the device and dtype of what a stage that trains on nothing returns.
        """
        course, first = self.course, modules[0].index
        if batch is not None:
            self._boundaries.given(batch)
        course.call(batch)
        if self._edges is not None:
            self._edges.begin(course.step)
        outs = []
        with updating(updates, autocast, like.device) as scale:
            for stage, begin, end in self._stages:
                trained = course.batch(stage)
                with self._region(0 if trained is None else len(trained[0]), course.calls - 1):
                    outs.append(self._through(stage, modules[begin - first : end - first + 1], updates, scale, like))
        if self._edges is not None:
            self._edges.trained()
        course.called()
        losses, counts = (torch.cat([getattr(o, name) for o in outs]) for name in ("module_losses", "module_counts"))
        loss = outs[0].loss if len(outs) == 1 else losses.sum()
        out = (loss.detach(), outs[-1].output, losses, counts)
        if not course.delay:
            return LocalOutput(*out)
        delayed = DelayedOutput(*out)
        delayed.target = like.new_empty(0) if trained is None else trained[1]
        return delayed

    def _through(
        self, stage: int, modules: Sequence[LocalModule], updates: Updates, scale: Tensor | None, like: Tensor
    ) -> LocalOutput:
        batch, before = self.course.batch(stage), self.course.batch(stage - 1) if stage else None
        if batch is None:
            if before is not None:
                self._boundaries.fill(stage, before)
            nan = like.new_full((len(modules),), torch.nan)
            nothing = torch.full((len(modules), *self._task.count_shape), -1, device=like.device)
            return LocalOutput(nan.sum(), like.new_empty(0, self._task.outputs), nan, nothing)
        relay = passing(modules, batch[0], *self._boundaries.receive(stage, batch, before))
        # Among replicas a module is updated when the next one's gradients are there: later than it ends.
        trained = self._edges.trained if self._edges is not None and updates.replicas is None else None
        streams = _Handing(stage, modules[-1].index, self._boundaries, trained, self._shards)
        return local_pass(modules, *batch, scale, updates.take, streams, relay)

    @property
    def calls_to_drain(self) -> int:
        """Calls until every stage has trained on every batch."""
        return (self.count - 1) * self.course.delay if self.course.under_way else 0

    def drained(self) -> None:
        """Every stage has trained on every batch; in all stages."""
        if self._edges is not None:
            self._edges.close(self.course.steps)
        self.course.end()

    @property
    def stages(self) -> list[int]:
        """The stages of this process, by number."""
        return [stage for stage, _, _ in self._stages]

    def in_flight(self) -> dict[int, list[list[Tensor]]]:
        """For each stage of this process the features that it is still to receive, oldest first."""
        course, found = self.course, {}
        for stage in self.stages:
            sizes = [len(x) for x, _ in course.in_flight(stage)]
            if sizes:
                found[stage] = self._boundaries.in_flight(stage, sizes)
        return found

    def restart(
        self,
        begun: int,
        batches: int = 0,
        kept: Sequence[Batch] = (),
        in_flight: Mapping[int, list[list[Tensor]]] | None = None,
    ) -> None:
        """End the run in all stages, whatever is in flight, and begin one that is ``batches`` old; see ``Course``."""
        left = (self.course.behind(self.stages[0]), self.course.behind(self.stages[-1] + 1))
        self._boundaries.restart(left, in_flight or {})
        if self._edges is not None:
            self._edges.close(self.course.steps)
        self.course.resume(begun, batches, kept)


class _Handing(OneStream):
    """Sends a stage's output on before the last module's backward begins, and parameters once they are updated."""

    def __init__(
        self,
        stage: int,
        last: int,
        boundaries: Boundaries,
        trained: Callable[[int | None], None] | None,
        shards: Shards | None,
    ) -> None:
        self._stage, self._last = stage, last
        self._boundaries = boundaries
        self._trained = trained
        self._shards = shards

    @contextmanager
    def module(self, index: int) -> Iterator[None]:
        then = None if index == self._last else index + 1
        with nullcontext() if self._shards is None else self._shards.whole(index, then):
            yield
        if self._trained is not None:
            self._trained(index)

    def handed_on(self, index: int, h: Tensor, history: Sequence[Tensor | None]) -> None:
        if index == self._last:
            self._boundaries.send(self._stage, h, history)


def passing(modules: Sequence[PassModule], x: Tensor, h: Tensor, history: list[Tensor | None]) -> Relay:
    """A relay that has come as far as ``h``."""
    relay = Relay(modules, x)
    relay.h, relay.history = h, history
    return relay

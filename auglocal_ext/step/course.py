"""Which batch each stage trains on in a call, and the batches that are kept for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from torch import Tensor

Batch = tuple[Tensor, Tensor]


class Course:
    """In call i of a run, stage s trains on the batch of call ``i - s * delay``.

    Args:
        delay: D.
        oldest: the last stage of this process, which decides how many batches are kept: ``oldest * delay``.

    Attributes:
        begun: training passes of every stage before the present run.
        batches: given in the present run.
    """

    def __init__(self, delay: int, oldest: int) -> None:
        self.delay = delay
        self.begun = 0
        self.batches = 0
        self._kept: deque[Batch | None] = deque(maxlen=oldest * delay + 1)
        self._calls = 0

    @property
    def calls(self) -> int:
        """Of the present run."""
        return self._calls

    @property
    def under_way(self) -> bool:
        """Whether later stages have not trained on all batches."""
        return self.delay > 0 and self.batches > 0

    def call(self, batch: Batch | None) -> None:
        """A call begins, with a batch or, at the end of a run, without one."""
        self._calls += 1
        if batch is not None:
            self.batches += 1
            if self._kept.maxlen != 1:  # the caller may use the memory again
                batch = batch[0].detach().clone(), batch[1].detach().clone()
        self._kept.append(batch)

    def batch(self, stage: int) -> Batch | None:
        """What the stage trains on in this call; of this process's stages and earlier ones."""
        age = stage * self.delay
        return self._kept[-1 - age] if age < len(self._kept) else None

    def step(self, stage: int) -> int | None:
        """Which training pass of the stage this call is; None where it trains on nothing."""
        return None if self.batch(stage) is None else self.begun + self._calls - 1 - stage * self.delay

    def steps(self, stage: int) -> int:
        """How many training passes of the stage are over, after a call."""
        return self.begun + min(self.batches, max(0, self._calls - stage * self.delay))

    def behind(self, stage: int) -> int:
        """How many batches of features lie before a stage, after a call."""
        return 0 if stage == 0 else self.steps(stage - 1) - self.steps(stage)

    def in_flight(self, stage: int) -> list[Batch]:
        """The batches of these features, oldest first; of a stage of this process."""
        return self.kept(stage)[: self.behind(stage)]

    def kept(self, stage: int) -> list[Batch]:
        """Batches that a stage of this process is still to train on, oldest first; after a call."""
        count = stage * self.delay
        return [batch for batch in list(self._kept)[-count:] if batch is not None] if count else []

    def called(self) -> None:
        """A call ends: a batch that no later call reads is released."""
        if self._kept.maxlen == 1:
            self._kept.clear()

    def end(self) -> None:
        """The run is over: every stage has trained on every batch."""
        self.begun += self.batches
        self.batches = self._calls = 0
        self._kept.clear()

    def resume(self, begun: int, batches: int, kept: Sequence[Batch]) -> None:
        """Go on within a run, ``batches`` calls after it began; ``kept`` are the last of them."""
        self.begun, self.batches, self._calls = begun, batches, batches
        self._kept.clear()
        self._kept.extend(kept)

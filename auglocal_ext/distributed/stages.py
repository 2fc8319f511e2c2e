"""The local modules of one network on several processes, a run of them on each."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .link import Link, receive_now, send_now
from .mesh import group_like


def balanced_cuts(costs: Sequence[float], stages: int) -> tuple[int, ...]:
    """Cuts of a row of costs into runs whose largest sum is smallest; the first such cuts.

    Args:
        costs: of each local module, at least one per stage.
        stages: number of runs.

    Returns:
        The index of the first module of every stage but the first.
    """
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[s][k]: the smallest largest sum of k modules in s + 1 runs, and where the last of them begins
    best = [[(sums[k], 0) for k in range(len(costs) + 1)]]
    for s in range(1, stages):
        row = [(float("inf"), 0)] * (len(costs) + 1)
        for k in range(s + 1, len(costs) + 1):
            row[k] = min((max(best[-1][j][0], sums[k] - sums[j]), j) for j in range(s, k))
        best.append(row)
    cuts, k = [], len(costs)
    for s in range(stages - 1, 0, -1):
        k = best[s][k][1]
        cuts.append(k)
    return tuple(reversed(cuts))


def cut_numbers(cuts: Any) -> tuple[int, ...]:
    """``stage_cuts`` as a tuple of whole numbers; TypeError for anything else."""
    try:
        return tuple(map(operator.index, cuts))
    except TypeError:
        raise TypeError(
            f"stage_cuts are the numbers of local modules, such as (4, 9), or Balanced(); got {cuts!r}"
        ) from None


def checked_cuts(cuts: Sequence[int], stages: int | None, modules: int) -> tuple[int, ...]:
    """``stage_cuts`` as a tuple.

    Args:
        cuts: the first local module of every stage but the first.
        stages: how many there are; None for any number of at least two.
        modules: of the network.

    Raises:
        TypeError: for cuts that are no numbers.
        ValueError: for cuts that do not give every stage a module.
    """
    cuts = cut_numbers(cuts)
    wrong = len(cuts) < 1 if stages is None else len(cuts) != stages - 1
    if wrong or list(cuts) != sorted(set(cuts)) or not all(0 < c < modules for c in cuts):
        of = "the stages" if stages is None else f"the {stages} stages"
        numbers = "increasing numbers" if stages is None else f"{stages - 1} increasing numbers"
        raise ValueError(
            f"stage_cuts names the first local module of each of {of} but the first: {numbers} within 1 .. "
            f"{modules - 1}; got {cuts}"
        )
    return cuts


class Stage:
    """This process's place in the row of stages.

    Args:
        group: process group of the stages, in order.
        cuts: the first local module of every stage but the first.
        modules: K.
        kept: for each local module the module inputs, by index, that modules after it are supplied with.
        check_batches: compare what all stages were given, sample by sample; reads a value from the device.
        delay: calls from sending features to receiving them.

    Attributes:
        index, count: which stage, of how many.
        first, last: its local modules.
    """

    def __init__(
        self,
        group: Any,
        cuts: Sequence[int],
        modules: int,
        kept: Sequence[frozenset[int]],
        check_batches: bool,
        delay: int = 0,
    ) -> None:
        self.index, self.count = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        bounds = [0, *cuts, modules]
        self.first, self.last = bounds[self.index], bounds[self.index + 1] - 1
        self._supplied, self._supplies = crossing_inputs(kept, self.first), crossing_inputs(kept, self.last + 1)
        self._check_batches = check_batches
        self._digest: Tensor | None = None
        self._largest: int | None = None
        # Training has a group of its own, because the next batch has been requested already: what else is sent among
        # these processes, by inference or by another network's step, must not be taken for it.
        training, self._inference = group_like(group), group_like(group)
        self._from: Link | None = None
        self._to: Link | None = None
        if self.index > 0:
            names = _names(self.first - 1, self._supplied)
            self._from = Link(training, self.index - 1, self.index, names, check_batches, delay)
        if self.index < self.count - 1:
            names = _names(self.last, self._supplies)
            self._to = Link(training, self.index, self.index + 1, names, check_batches, delay)

    def check(self, batch: int) -> None:
        """ValueError for a batch that the messages do not hold; in every stage alike, before any work."""
        if self._largest is not None and batch > self._largest:
            raise ValueError(
                f"a batch of {batch} samples after a first one of {self._largest}: messages between stages have the "
                "size of the first batch; begin with the largest"
            )

    def given(self, batch: int) -> None:
        """The stages are given a batch of so many samples."""
        if self._largest is None:
            self._largest = batch

    def note(self, x: Tensor, y: Tensor) -> None:
        """The batch that this stage trains on."""
        if self._check_batches:
            self._digest = _digest(x) + _digest(y)

    def fill(self, samples: int, device: torch.device) -> None:
        """At the beginning of a run with a delay: wait for the features sent in this call, which a later one takes."""
        assert self._from is not None
        self._from.fill(samples, device)

    def receive(
        self, x: Tensor, *, inference: bool = False, sent: int | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The input of the stage's first module, and the inputs of the modules before it, as far as they are needed.

        ``inference``: nothing is requested ahead, and sizes may change from call to call.
        ``sent``: of how many samples the stage before sends features in this call; None where it sends none.
        """
        history: list[Tensor | None] = [None] * self.first
        if self._from is None:
            return x, history
        if inference:
            h, *supplied = receive_now(x.device, self._inference, self.index - 1)
        else:
            h, *supplied = self._from.receive(len(x), x.device, sent)
            if self._digest is not None and len(supplied) > len(self._supplied):  # a checkpoint has none
                self._compare(supplied.pop(), self._digest)
        history[0] = x
        for index, tensor in zip(self._supplied, supplied, strict=True):
            history[index] = tensor
        return h, history

    def send(self, h: Tensor, history: Sequence[Tensor | None], *, inference: bool = False) -> None:
        """Hand the output of the stage's last module on; for ``inference`` this returns when it has arrived."""
        if self._to is None:
            return
        supplies = [history[index] for index in self._supplies]
        tensors = [h, *(tensor for tensor in supplies if tensor is not None)]
        if inference:
            send_now(tensors, self._inference, self.index + 1)
        else:
            self._to.send(tensors if self._digest is None else [*tensors, self._digest])

    def _compare(self, theirs: Tensor, ours: Tensor) -> None:
        differ = (theirs != ours).nonzero().flatten().tolist()
        if differ:
            raise ValueError(
                f"stages {self.index - 1} and {self.index} were given other samples at {len(differ)} of {len(ours)} "
                f"places of the batch, the first at {differ[0]}: give every stage the same batches in the same order"
            )

    def in_flight(self, sizes: Sequence[int]) -> list[list[Tensor]]:
        """Features that were sent to this stage and not received, batch by batch, with the inputs supplied."""
        if self._from is None or not sizes:
            return []
        return [tensors[: 1 + len(self._supplied)] for tensors in self._from.in_flight(sizes)]

    def resume(self, in_flight: Sequence[list[Tensor]]) -> None:
        """Begin the next run with what :meth:`in_flight` returned; after :meth:`close`."""
        if self._from is not None:
            self._from.resume(in_flight)

    def close(self, device: torch.device, left: Sequence[int] = (0, 0)) -> None:
        """End the run; in all stages. A further batch begins a new one.

        ``left``: how many batches were sent and not received, before this stage and after it.
        """
        self._largest = None
        for link, count in zip((self._from, self._to), left, strict=True):
            if link is not None:
                link.close(device, count)


def crossing_inputs(kept: Sequence[frozenset[int]], first: int) -> list[int]:
    """Module inputs, by index, that cross a cut before module ``first`` besides the features.

    The network's input, which is that of module 0, comes from every stage's own loader.
    """
    return [i for i in range(1, first) if i in kept[first - 1]]


def _names(module: int, supplied: Sequence[int]) -> list[str]:
    inputs = (f"the input of local module {index}" for index in supplied)
    return [f"the output of local module {module}", *inputs, "the digest of the batch"]


def _digest(samples: Tensor) -> Tensor:
    """An int64 for each sample, of its bits and of where its elements are: no order of summing changes it."""
    flat = samples.detach().flatten(1) if samples.dim() > 1 else samples.detach().unsqueeze(1)
    if flat.is_floating_point():
        flat = flat.contiguous().view(_BITS[flat.element_size()])
    # A factor for each place, as good as drawn (two steps of splitmix64); products and sums wrap around.
    factors = torch.arange(1, flat.shape[1] + 1, dtype=torch.int64, device=flat.device) * -7046029254386353131
    factors = (factors ^ (factors >> 30)) * -4658895280553007687
    factors = (factors ^ (factors >> 27)) | 1
    return (flat.long() * factors).sum(1)


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

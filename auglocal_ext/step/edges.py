"""Which parameters cross a cut between stages, because an auxiliary network follows them, and when they are sent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..auxiliary.base import Auxiliary, parts_of
from ..auxiliary.followed import Followed
from ..distributed import ParameterEdge, group_like
from ..local_modules import LocalModule
from ..local_sequential import LocalSequential


@dataclass(frozen=True)
class Crossing:
    """Parameters that one stage reads and a later one trains.

    Attributes:
        followed: what reads them; several in a stage that read the same share a crossing.
        module: the local module of the first of these.
        reader, owner: the stages.
        last: the last local module that trains any of the parameters.
    """

    followed: list[Followed]
    module: int
    reader: int
    owner: int
    last: int


def crossed(module: LocalModule) -> str:
    """What crosses the cut before ``module`` besides its input; empty if nothing does."""
    first = None if module.segment is None else module.segment.first
    return "" if first is None else ", ".join(map(str, first.crossing))


def refuse_crossed(modules: Sequence[LocalModule], cuts: Sequence[int]) -> None:
    """ValueError where stages would be cut across a skip connection: a stage sends its output alone."""
    for cut in cuts:
        if crossed(modules[cut]):
            free = [module.index for module in modules[1:] if not crossed(module)]
            raise ValueError(
                f"stages cannot be cut before local module {cut}: the outputs of {crossed(modules[cut])} cross this "
                f"cut, and a stage sends its last output alone. Stages can be cut before {free or 'no local module'}"
            )


def crossings(net: LocalSequential, cuts: Sequence[int]) -> list[Crossing]:
    """What crosses the cuts besides features, in the same order in every process.

    Raises:
        ValueError: for what one stage would have to read of another and cannot.
    """
    modules = net.local_modules
    refuse_crossed(modules, cuts)
    names = {id(tensor): name for name, tensor in (*net.named_parameters(), *net.named_buffers())}
    constant = {id(b) for module in modules if module.segment is not None for b in module.segment.constants()}
    trained_by: dict[int, int] = {}  # the last module that trains a parameter
    owner: dict[int, int] = {}
    for module in modules:
        stage = _stage(module.index, cuts)
        buffers = (b for part in module.parts() for b in part.buffers() if id(b) not in constant)
        for what, tensors in (("parameter", module.parameters()), ("buffer", buffers)):
            for tensor in tensors:
                trained_by[id(tensor)] = module.index
                if owner.setdefault(id(tensor), stage) != stage:
                    raise ValueError(
                        f"local module {module.index} shares a {what} of shape {tuple(tensor.shape)} with one of "
                        f"another stage, {names[id(tensor)]}: choose stage_cuts that keep them together, or give each "
                        "module one of its own"
                    )
    found: dict[tuple[Any, ...], Crossing] = {}
    for module, part in followers(modules):
        stage, follows = _stage(module.index, cuts), list(part.follows())
        what = f"{type(part).__name__} of local module {module.index}"
        if not follows:
            raise ValueError(
                f"{what} depends on other layers and does not say by follows() which parameters it reads, so they "
                "cannot be sent to its stage: train this rule in one stage"
            )
        for followed in follows:
            parameters = [id(p) for p in followed.parameters]
            owners = {owner.get(p, stage) for p in parameters}
            if owners <= {stage}:
                continue
            if len(owners) > 1 or min(owners) < stage:
                raise ValueError(
                    f"{what} follows parameters of stages {', '.join(map(str, sorted(owners)))} and is in stage "
                    f"{stage}: what is followed is sent from one stage to an earlier one. Choose other stage_cuts"
                )
            key = (stage, followed.every, followed.lag, *parameters)
            last = max(trained_by[p] for p in parameters)
            crossing = found.setdefault(key, Crossing([], module.index, stage, owners.pop(), last))
            crossing.followed.append(followed)
    return list(found.values())


def _stage(module: int, cuts: Sequence[int]) -> int:
    return sum(cut <= module for cut in cuts)


def followers(modules: Sequence[LocalModule]) -> Iterator[tuple[LocalModule, Auxiliary]]:
    """Local modules whose auxiliary network, or a part of it, reads parameters of other layers, with that part."""
    for module in modules:
        for part in [] if module.auxiliary is None else parts_of(module.auxiliary):
            if isinstance(part, Auxiliary) and part.follows_layers:
                yield module, part


class Edges:
    """The crossings that this process takes part in, during a run.

    Args:
        group: process group of the stages.
        found: all crossings of the network.
        device: of this process's copies.
        shards: the mesh of the replicas that share parameters; None where each has all of them.
    """

    def __init__(self, group: Any, found: Sequence[Crossing], device: torch.device, shards: Any) -> None:
        index = torch.distributed.get_rank(group)
        # Two stages need a group for each of their crossings; every process makes all groups.
        pairs = Counter[tuple[int, int]]()
        groups: list[Any] = []
        self._edges: list[tuple[Crossing, ParameterEdge]] = []
        self._under_way: set[int] = set()
        for each in found:
            pair = each.owner, each.reader
            if pairs[pair] == len(groups):
                groups.append(group_like(group))
            number, first = pairs[pair], each.followed[0]
            pairs[pair] += 1
            if index not in pair:
                continue
            parameters, lag = _parameters(first), first.lag
            edge = ParameterEdge(groups[number], *pair, parameters, first.every, lag, device, each.module, shards)
            self._edges.append((each, edge))
            if index == each.reader:
                for followed in each.followed:
                    followed.read_from(edge)

    def begin(self, step: Callable[[int], int | None]) -> None:
        """A call begins. ``step``: the training pass of each stage in this call; None where it trains on nothing."""
        self._step = step
        self._under_way = set()
        for at, (crossing, edge) in enumerate(self._edges):
            reads = step(crossing.reader)
            if reads is not None:
                edge.begin(reads)
                self._under_way.add(at)

    def trained(self, module: int | None = None) -> None:
        """This process has updated ``module``, None: all of its modules: what is followed of them is sent."""
        for at in sorted(self._under_way):
            crossing, edge = self._edges[at]
            reads = self._step(crossing.reader)
            if module in (None, crossing.last) and reads is not None:
                edge.end(reads)
                self._under_way.discard(at)

    def close(self, steps: Callable[[int], int]) -> None:
        """End the run; in all stages. ``steps``: how many training passes of each stage are over."""
        for crossing, edge in self._edges:
            over = steps(crossing.reader)
            edge.close(over, crossing.followed[0].needs(over))


def _parameters(followed: Followed) -> Callable[[], list[Any]]:
    return lambda: followed.parameters

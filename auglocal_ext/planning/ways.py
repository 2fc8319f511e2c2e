"""What each local module costs for each way of recomputation, from few runs of a step on fake tensors.

All modules share a run, and each recomputes in its own way there: local modules do not change each other's cost.
``"none"``, ``"auxiliary"`` and ``"all"`` take one run each. So does each number of recomputed layers, except between
layers that are alike. There the peak is a convex function of the number, and few runs show all of it:

Let layers p + 1 .. q be alike, and the first n recompute, p < n < q. From one n to the next, what is live at a point of
the step changes by a constant: layer n + 1 keeps its input in place of its activations, and its neighbours are the
same. (What two layers keep together, such as a tensor between them, involves neighbours alone.) So what is live at the
i-th layer, counted from the first, from the last, or from where recomputation ends, is affine in n and i. The peak is
the largest of these, so it is convex in n. If three numbers lie on a line, all between them do. FLOPs are affine.

If the numbers that were run are not convex, or their FLOPs not affine, all of them are run.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import groupby, pairwise

from ..local_modules import RECOMPUTE, Recompute
from .estimate import ModuleCost, StepEstimate


class MeasuredWays:
    """The cost of each local module for each way of recomputation that has been measured.

    Args:
        estimate: runs the step.
        possible: the ways each module can take, as ``net.recompute_ways`` has them.

    Attributes:
        base: bytes live between steps.
        end: peak after the last module.
        modules: for each module, its cost by way; ``"none"`` first, the numbers of layers last, ascending.
        runs: how many steps have run.
    """

    def __init__(self, estimate: StepEstimate, possible: Sequence[Sequence[Recompute]]) -> None:
        self._estimate = estimate
        self._possible = possible
        self.base = self.end = self.runs = 0
        self.modules: tuple[dict[Recompute, ModuleCost], ...] = tuple({} for _ in possible)
        for way in RECOMPUTE:
            if any(way in ways for ways in possible):
                self.run([way if way in ways else "none" for ways in possible])

    def run(self, ways: Sequence[Recompute]) -> None:
        """Measure a step whose modules recompute in these ways."""
        cost = self._estimate.cost(ways)
        self.runs += 1
        self.base, self.end = max(self.base, cost.base), max(self.end, cost.end)
        for known, way, module in zip(self.modules, ways, cost.modules, strict=True):
            known.setdefault(way, module)

    def run_numbers(self) -> None:
        """Measure, or derive, the cost of every possible number of recomputed layers."""
        spans = [alike_runs(likenesses) for likenesses in self._estimate.likenesses_of_layers()]
        searches = [
            _numbers_to_run(known, [way for way in ways if isinstance(way, int)], runs)
            for known, ways, runs in zip(self.modules, self._possible, spans, strict=True)
        ]
        wanted = [next(search, None) for search in searches]
        while any(number is not None for number in wanted):
            self.run(["none" if number is None else number for number in wanted])
            wanted = [
                None if number is None else next(search, None) for number, search in zip(wanted, searches, strict=True)
            ]
        for known in self.modules:
            numbers = sorted(way for way in known if isinstance(way, int))
            for number in numbers:
                known[number] = known.pop(number)


def _numbers_to_run(
    known: dict[Recompute, ModuleCost], numbers: Sequence[int], alike: Sequence[range]
) -> Iterator[int]:
    """Numbers of layers that have to be run, one after another; the others are added to ``known``.

    Args:
        known: costs by way; what has been asked for is in it when the next is asked for.
        numbers: all that are possible.
        alike: numbers between which the peak is convex and FLOPs are affine.
    """
    derived = {number for each in alike for number in each[1:-1]}
    yield from (number for number in numbers if number not in derived and number not in known)
    for each in alike:
        while (number := _next(ran := {n: known[n] for n in each if n in known})) is not None:
            yield number
        for first, last in pairwise(sorted(ran)):
            for number in range(first + 1, last):
                known[number] = _between(number, (first, ran[first]), (last, ran[last]))


def _next(ran: Mapping[int, ModuleCost]) -> int | None:
    """The number to run next, until those between any two that have run follow from them; None then."""
    numbers = sorted(ran)
    gaps = list(pairwise(numbers))
    slopes = [Fraction(ran[b].added - ran[a].added, b - a) for a, b in gaps]
    flops = [Fraction(ran[b].flops - ran[a].flops, b - a) for a, b in gaps]
    regular = slopes == sorted(slopes) and len(set(flops)) == 1 and flops[0].denominator == 1
    for i, (a, b) in enumerate(gaps):
        if b - a == 1:
            continue
        if not regular or i == 0:
            return a + 1
        if slopes[i] in (slopes[i - 1], *slopes[i + 1 : i + 2]):
            continue  # three numbers on a line
        if i + 1 == len(gaps):
            return b - 1
        # The lines through the neighbours bound the peak from below, and this is where they meet.
        left, right = slopes[i - 1], slopes[i + 1]
        meet = (ran[b].added - ran[a].added + left * a - right * b) / (left - right)
        return min(max(math.floor(meet), a + 1), b - 1)
    return None


def _between(number: int, first: tuple[int, ModuleCost], last: tuple[int, ModuleCost]) -> ModuleCost:
    (a, low), (b, high) = first, last
    added = low.added + (high.added - low.added) * (number - a) // (b - a)
    flops = low.flops + (high.flops - low.flops) * (number - a) // (b - a)
    return ModuleCost(low.before, added, low.input, flops)


def alike_runs(likenesses: Sequence[object]) -> list[range]:
    """The numbers of recomputed layers between which the peak is convex, three or more, for each run of alike layers.

    Of layers p + 1 .. q (counted from 1) they are p + 1 .. q - 1: layers on both sides of each are alike.
    """
    found, first = [], 0
    for _, run in groupby(likenesses):
        last = first + len(list(run))
        if last - first >= 4:
            found.append(range(first + 1, last))
        first = last
    return found

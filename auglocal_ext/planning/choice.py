"""The choice of recomputation per local module, exact, from what each module costs under each choice.

The peak of a mixture is the largest of its modules' peaks. So the lowest possible peak is the largest of the modules'
lowest ones, and each module takes the fewest recomputed FLOPs that stay within it, or within the budget.

With overlap the figure is what is alive outside modules, plus the largest even module, plus the largest odd one: two
streams do not share freed memory. A module's input lies in the other stream's memory and stays there until its last
reader has passed. Every limit for the even modules is tried with what it leaves to the odd ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..local_modules import Recompute
from ..memory.meter import ROUNDING
from .estimate import ModuleCost

_STREAMS = (0, 1)  # even and odd modules


@dataclass(frozen=True)
class Choice:
    """``recompute`` of each local module, and whether modules overlap."""

    recompute: tuple[Recompute, ...]
    overlap: bool


class Costs:
    """Bytes and FLOPs of every choice, from those of each module: local modules do not change each other's.

    Args:
        modules: for each module its cost by way of recomputation, ``"none"`` first.
        base: bytes live between steps.
        end: peak after the last module.
        history: whether modules are supplied with inputs of earlier ones.

    Attributes:
        base: bytes live between steps.
        peaks: for each module and way, live bytes at its peak, one module after the other.
        module_flops: for each module and way, FLOPs of forward, backward and recomputation.
    """

    def __init__(self, modules: Sequence[Mapping[Recompute, ModuleCost]], base: int, end: int, history: bool) -> None:
        self._end, self.base = end, base
        plain = [module["none"] for module in modules]
        self.peaks = tuple({way: cost.peak for way, cost in module.items()} for module in modules)
        self.module_flops = tuple({way: cost.flops for way, cost in module.items()} for module in modules)
        # What the pass keeps from module to module: losses, counts (the last module's too), context, all gradients if
        # they are clipped together.
        self._kept = max(module.before - self.base - module.input for module in plain) + 2 * ROUNDING
        inputs = [module.input for module in plain]
        if history:  # two modules longer than without overlap
            self._kept += 2 * max(inputs)
        # A module's stream holds what it makes, and the input of the one before, which was made on this stream and is
        # kept until its last reader has passed; its own input was made on the other.
        held = [0, *inputs[:-1]]
        self._own = tuple(
            {way: cost.added + extra for way, cost in module.items()}
            for module, extra in zip(modules, held, strict=True)
        )

    def bytes(self, choice: Choice) -> int:
        """Peak of a step."""
        if not choice.overlap:
            return max(self._end, *(peak[way] for peak, way in zip(self.peaks, choice.recompute, strict=True)))
        own = [own[way] for own, way in zip(self._own, choice.recompute, strict=True)]
        return max(self._end, self.base + self._kept + sum(max(own[stream::2], default=0) for stream in _STREAMS))

    def recomputed(self, choice: Choice) -> int:
        """FLOPs of what runs a second time in a step."""
        flops = zip(self.module_flops, choice.recompute, strict=True)
        return sum(each[way] - each["none"] for each, way in flops)

    def _cheapest(self, module: int, sizes: Mapping[Recompute, int], limit: int) -> Recompute | None:
        """The way with the fewest FLOPs whose size is within the limit; of equals the first."""
        flops = self.module_flops[module]
        return min((way for way in sizes if sizes[way] <= limit), key=lambda way: flops[way], default=None)

    def one_by_one(self, limit: int) -> Choice | None:
        """The cheapest choice with a peak of at most ``limit`` without overlap."""
        ways = [self._cheapest(k, peak, limit) for k, peak in enumerate(self.peaks)]
        found = tuple(way for way in ways if way is not None)
        return None if self._end > limit or len(found) < len(ways) else Choice(found, overlap=False)

    def overlapped(self, limits: tuple[int, int]) -> Choice | None:
        """The cheapest choice whose even and odd modules are within these limits of their own."""
        ways = [self._cheapest(k, own, limits[k % 2]) for k, own in enumerate(self._own)]
        found = tuple(way for way in ways if way is not None)
        return None if len(found) < len(ways) else Choice(found, overlap=True)

    def limits(self, stream: int) -> list[int]:
        """Every limit for the modules of a stream that makes a difference, but those that no choice is within."""
        own = self._own[stream::2]
        least = max((min(sizes.values()) for sizes in own), default=0)
        return sorted({least, *(size for sizes in own for size in sizes.values() if size > least)})

    def left_of(self, budget: int, own: int) -> int:
        """What a budget leaves to one stream if the other holds ``own``."""
        return budget - self.base - self._kept - own

    def least(self, overlap: bool) -> Choice:
        """Of each module the way with the least bytes."""
        sizes = self._own if overlap else self.peaks
        return Choice(tuple(min(each.items(), key=lambda item: item[1])[0] for each in sizes), overlap)


def lowest_peak(costs: Costs, overlap: bool) -> Choice:
    """The lowest peak there is; of the choices with this peak the one with the fewest FLOPs."""
    choice = cheapest_within(costs, costs.bytes(costs.least(overlap)), overlap)
    assert choice is not None
    return choice


def cheapest_within(costs: Costs, budget: int, overlap: bool) -> Choice | None:
    """The choice with the fewest FLOPs whose peak is within ``budget``; None if there is none.

    With overlap every limit of the even modules is tried, with all that it leaves to the odd ones; of equals the choice
    with the lowest peak is taken.
    """
    if not overlap:
        return costs.one_by_one(budget)
    choices = (costs.overlapped((even, costs.left_of(budget, even))) for even in costs.limits(0))
    found = [choice for choice in choices if choice is not None and costs.bytes(choice) <= budget]
    return min(found, key=lambda choice: (costs.recomputed(choice), costs.bytes(choice)), default=None)

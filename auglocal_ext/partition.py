"""Where a network is cut: from layers to local modules, by given numbers or by balanced costs."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

#: What the parts of a balanced cut have equally much of.
Balance = Literal["memory", "flops", "time"]


def equal_sizes(num_layers: int, num_modules: int) -> list[int]:
    """Numbers of layers per module, contiguous and as equal as possible.

    With a remainder of one the first module takes the extra layer (the stem); with any other remainder the last
    modules take one more each. This is the partition of InfoPro's and ContSup's released configurations:
    ResNet-32 (16 layers) K = 3 gives 6, 5, 5; ResNet-110 (55 layers) K = 4 gives 13, 14, 14, 14.
    """
    size, extra = divmod(num_layers, num_modules)
    sizes = [size] * num_modules
    if extra == 1:
        sizes[0] += 1
    else:
        for k in range(num_modules - extra, num_modules):
            sizes[k] += 1
    return sizes


def cut_points(num_layers: int, modules: int | Sequence[int] | None) -> tuple[int, ...]:
    """Indices of the last layer of each local module, ascending, ending in ``num_layers - 1``.

    Args:
        num_layers: L, the number of layers.
        modules: None for one module per layer; K for K contiguous modules of equal counts
            (:func:`equal_sizes`); or explicit cut points: the layer index with which each module but the last
            ends, ascending, e.g. ``[2, 6]`` for layers 0..2, 3..6, 7..L-1.

    Raises:
        TypeError: if ``modules`` is none of these.
        ValueError: if K is below 1 or above L, or cut points are not ascending within ``0 .. L-2``.
    """
    if modules is None:
        return tuple(range(num_layers))
    if isinstance(modules, Sequence) and not isinstance(modules, str | bytes):
        cuts = [operator.index(c) for c in modules]
        if any(b <= a for a, b in zip(cuts, cuts[1:], strict=False)) or any(c < 0 or c > num_layers - 2 for c in cuts):
            raise ValueError(
                f"cut points are the index of the last layer of each module but the last, ascending within 0 .. "
                f"{num_layers - 2} for this network of {num_layers} layers; got {list(modules)}"
            )
        return (*cuts, num_layers - 1)
    try:
        count = operator.index(cast(int, modules))
    except TypeError:
        raise TypeError(
            f"modules must be None (one per layer), a number of modules or a sequence of cut points, "
            f"got {type(modules).__name__}"
        ) from None
    if not 1 <= count <= num_layers:
        raise ValueError(f"modules={count}: the network has {num_layers} layers; choose 1 .. {num_layers}")
    ends, last = [], -1
    for size in equal_sizes(num_layers, count):
        last += size
        ends.append(last)
    return tuple(ends)


#: Cut points of the "memory balance" partitions in ContSup's released configuration for CIFAR-10, by
#: (number of layers, number of modules): 16 layers is ResNet-32, 55 layers ResNet-110.
CONTSUP_BALANCED: dict[tuple[int, int], tuple[int, ...]] = {
    (16, 2): (4,),
    (16, 4): (3, 5, 8),
    (16, 8): (2, 3, 4, 7, 8, 12, 13),
    (55, 2): (15,),
    (55, 3): (10, 21),
    (55, 4): (7, 15, 27),
}


@dataclass(frozen=True)
class Balanced:
    """Cuts whose costliest part is cheapest: of layers into local modules, or of local modules into stages.

    ``LocalSequential(modules=Balanced(K))`` makes K local modules whose largest saves the fewest bytes for its backward
    pass; with ``by="flops"``, whose costliest takes the fewest FLOPs in a training step. Both are counted when the
    wrapper is built, on a batch of the example twice. A module's cost is the sum over its layers, its head and its
    context.

    ``LocalStep(stage_cuts=Balanced(by="flops"))`` balances the counted FLOPs of stages,
    ``Balanced(by="time", batch_size=N)`` the measured time of each local module's part of a step. See
    :class:`auglocal_ext.LocalStep`.

    Args:
        modules: number of parts. May be left out for stages, of which there are as many as the mesh has.
        by: what is balanced: ``"memory"`` or ``"flops"`` for local modules, ``"flops"`` or ``"time"`` for stages.
        batch_size: samples per call of the measured step; required by ``"time"``.

    Raises:
        ValueError: for an unknown ``by``, and for ``"time"`` without a batch size. Where it is used, for one that
            cannot be balanced there.
    """

    modules: int | None = None
    by: Balance = "memory"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        if self.by not in get_args(Balance):
            raise ValueError(f"by is one of {', '.join(get_args(Balance))}; got {self.by!r}")
        size = self.batch_size
        if self.by == "time" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(
                'Balanced(by="time") measures steps on batches of batch_size samples: pass batch_size=, at least 1; '
                f"got {size!r}"
            )
        if self.by != "time" and size is not None:
            raise ValueError(f'batch_size is for Balanced(by="time"); leave it out with by={self.by!r}')


def balance(
    num_layers: int,
    num_modules: int,
    cost: Sequence[int],
    head_cost: Sequence[int],
    context_cost: Sequence[int],
) -> tuple[int, ...]:
    """Ends of the contiguous partition with the smallest maximum module cost (dynamic programme, O(K L^2)).

    Args:
        num_layers: L.
        num_modules: K.
        cost: of each layer, length L.
        head_cost: of the auxiliary network of a module that ends in layer i (0 for the last layer).
        context_cost: of the context encoders of a module that starts with layer i (0 for the first). Negative where a
            module's first layer costs less than it would inside.

    Returns:
        Index of the last layer of each module, as :func:`cut_points`.
    """
    if not 1 <= num_modules <= num_layers:
        raise ValueError(f"{num_modules} modules asked for, but the network has {num_layers} layers")
    prefix = [0]
    for value in cost:
        prefix.append(prefix[-1] + value)

    def module_cost(first: int, last: int) -> int:
        return prefix[last + 1] - prefix[first] + head_cost[last] + context_cost[first]

    beyond = sum(cost) + sum(head_cost) + sum(map(abs, context_cost)) + 1
    # best[j] = (smallest maximum, start of the last module) for layers 0..j cut into the current number of modules
    best = [(module_cost(0, j), 0) for j in range(num_layers)]
    history = [best]
    for count in range(2, num_modules + 1):
        step: list[tuple[int, int]] = []
        for j in range(num_layers):
            options = [(max(best[i - 1][0], module_cost(i, j)), i) for i in range(count - 1, j + 1) if i >= 1]
            step.append(min(options) if options else (beyond, 0))
        best = step
        history.append(best)
    ends, j = [], num_layers - 1
    for table in reversed(history):
        ends.append(j)
        j = table[j][1] - 1
    return tuple(reversed(ends))

"""Which local modules recompute, and whether two overlap, so that a step's memory is least or fits a budget.

The plan runs the step itself, optimizer included, on a copy of the network without data (``memory/copies.py``), once
for each way of recomputation. That is enough for every mixture, because local modules are isolated: the bytes that one
module adds do not depend on how others recompute. ``ways.py`` keeps the runs few where modules have many layers, and
``choice.py`` chooses exactly.

Not included: library workspaces, a captured step's copy of the batch, and the loss scaler. Autocast casts what it casts
on a CPU. On real CPU tensors the meter reads the predicted figure to the byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch

from ..local_modules import RECOMPUTE, Recompute
from ..local_sequential import LocalSequential
from ..step import MemoryPlan, OptimizerFactory
from ..step.edges import crossed
from ..step.memory_plan import amount, step_facts
from ..step.parameter_lists import listed
from ..step.refusals import refuse_autocast_around_a_plan
from ..step.updates import Clip
from .choice import Choice, Costs, cheapest_within, lowest_peak
from .estimate import StepEstimate
from .ways import MeasuredWays

#: How a step recomputes: one way for all modules, or ``"peak"``: only where it lowers the step's peak.
StepRecompute = Recompute | Literal["peak"]
MemoryBudget = int | str
_UNITS = {"": 1, "B": 1} | {
    prefix + unit: base**power
    for base, unit in ((1000, "B"), (1024, "iB"))
    for power, prefix in enumerate("KMGT", start=1)
}


class MemoryBudgetError(ValueError):
    """No choice of recomputation fits the budget; the message names the smallest budget that can be met.

    Attributes:
        least_bytes: the smallest budget that can be met.
    """

    def __init__(self, message: str, least_bytes: int) -> None:
        super().__init__(message)
        self.least_bytes = least_bytes


def plan_memory(
    net: LocalSequential,
    batch_size: int,
    optimizer: OptimizerFactory,
    *,
    params: Iterable[Any] | None = None,
    autocast: torch.dtype | None = None,
    clip_norm: float | None = None,
    clip: Clip = "module",
    accumulate: int = 1,
    recompute: StepRecompute | Sequence[Recompute] | None = None,
    memory_budget: MemoryBudget | None = None,
    overlap: bool | Literal["auto"] = "auto",
) -> MemoryPlan:
    """The memory of a :class:`LocalStep` and the choice of recomputation, predicted in seconds without a GPU.

    ::

        def sgd(params):
            return torch.optim.SGD(params, lr=0.8, momentum=0.9)

        plan = plan_memory(net, 1024, sgd, memory_budget="600MB")
        print(plan)
        step = LocalStep(net, sgd, plan=plan)

    Local modules are isolated. A step on fake tensors therefore measures what each module needs for one choice, and the
    peak of every mixture follows exactly. A plan runs such a step for ``"none"``, ``"auxiliary"`` and ``"all"``, and,
    unless everything fits without recomputation, for each number of layers; of numbers between layers that are alike a
    few are enough (:mod:`auglocal_ext.planning.ways`).

    The figure counts every tensor storage of a step after the first, rounded up to 512 bytes. It does not count library
    workspaces, the CUDA context, a captured step's copy of the batch, and the two scalars of an fp16 loss scaler. The
    optimizer steps as it would on the device of ``net``: fused, which has no temporaries, or in torch's other forms. On
    a CPU the default is the for-loop with temporaries of one parameter; for a GPU's step pass ``fused=True`` to it.
    ``net``, its device and the random state are not touched.

    With overlap, neither of the two streams can reuse memory of the other. The figure is then the sum of the largest
    even module, the largest odd one, and what is alive outside of modules.

    Args:
        net: the network, on any device, or built of fake tensors.
        batch_size: images per call, at most. They have the dtype of the parameters, and are channels last if weights
            are.
        optimizer, params, autocast, clip_norm, clip, accumulate: those of the :class:`auglocal_ext.LocalStep`.
        recompute: ``"peak"``: the lowest peak there is, and of all choices with this peak the least recomputation;
            or what ``net.recompute`` can be set to, such as ``"all"``; None: as ``net.recompute`` says.
        memory_budget: bytes, or a string such as ``"400MB"`` (1e6 bytes) or ``"0.4GiB"`` (2**30): the least
            recomputation (in FLOPs of convolutions and matrix products) that fits. Leave ``recompute`` at None.
        overlap: whether the step overlaps modules. ``"auto"``: if a budget is given and it costs no more recomputation.

    Raises:
        MemoryBudgetError: if nothing fits.
        ValueError: for an option out of range, for a ``recompute`` that a part of the network cannot honour, for a
            network or an optimizer that reads values of tensors, as ASGD and Adafactor do, and without ``autocast``
            inside ``torch.autocast``.
    """
    refuse_autocast_around_a_plan(autocast)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size is the number of images of a call, at least 1; got {batch_size!r}")
    if isinstance(recompute, str) and recompute not in ("peak", *RECOMPUTE):
        raise ValueError(
            f"recompute must be one of {', '.join(RECOMPUTE)}, a number of layers, one of these for each local module, "
            f'"peak" or None, got {recompute!r}'
        )
    if overlap not in (True, False, "auto"):
        raise ValueError(f'overlap must be True, False or "auto", got {overlap!r}')
    if budget is not None and recompute is not None:
        raise ValueError(
            f"memory_budget chooses the least recomputation that fits; it takes no recompute={recompute!r} beside it. "
            'Leave recompute out, or ask for recompute="peak", the lowest memory, without a budget'
        )
    settings: dict[str, Any] = {
        "autocast": autocast,
        "clip_norm": clip_norm,
        "clip": clip,
        "accumulate": accumulate,
    }
    params = list(net.parameters()) if params is None else listed(params)
    estimate = StepEstimate(net, batch_size, optimizer, params=params, **settings)
    fixed = None
    if budget is None and recompute != "peak":
        fixed = estimate.checked(net.recompute if recompute is None else cast("Recompute", recompute))
    measured = MeasuredWays(estimate, net.recompute_ways)
    if fixed is not None:
        if any(way not in known for way, known in zip(fixed, measured.modules, strict=True)):
            measured.run(fixed)
    elif budget is None or not _fits_plain(_costs(net, measured), budget, overlap):
        measured.run_numbers()
    costs = _costs(net, measured)
    if fixed is not None:
        chosen = Choice(fixed, overlap is True)
    elif budget is not None:
        chosen = _within(costs, budget, overlap, batch_size)
    else:
        chosen = lowest_peak(costs, overlap is True)
    return MemoryPlan(
        recompute=chosen.recompute,
        overlap=chosen.overlap,
        predicted_bytes=costs.bytes(chosen),
        base_bytes=costs.base,
        module_peaks=costs.peaks,
        module_flops=costs.module_flops,
        batch_size=batch_size,
        budget_bytes=budget,
        made_for=step_facts(net, estimate.optimizer, **settings),
    )


def parse_bytes(text: MemoryBudget) -> int:
    """Bytes of ``400``, ``"400MB"`` (1e6 each) or ``"0.4GiB"`` (2**30 each).

    Raises:
        ValueError: for anything else, and for nothing or less.
    """
    size = None
    if isinstance(text, int) and not isinstance(text, bool):
        size = text
    elif isinstance(text, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([A-Za-z]*)\s*", text)
        if match is not None and match[2] in _UNITS and float(match[1]) < 2**53:
            size = int(float(match[1]) * _UNITS[match[2]])
    if size is None or size < 1:
        raise ValueError(
            "a number of bytes is expected, or a string of a number and a unit such as "
            f'"400MB" (1 MB = 1e6 bytes) or "0.4GiB" (1 GiB = 2**30 bytes); got {text!r}'
        )
    return size


def _costs(net: LocalSequential, measured: MeasuredWays) -> Costs:
    history = len(net.context) > 0 or any(map(crossed, net.local_modules))
    return Costs(measured.modules, measured.base, measured.end, history)


def _fits_plain(costs: Costs, budget: int, overlap: bool | Literal["auto"]) -> bool:
    """Whether nothing has to be recomputed, with overlap where it may be."""
    nothing: Recompute = "none"
    return costs.bytes(Choice((nothing,) * len(costs.peaks), overlap is not False)) <= budget


def _within(costs: Costs, budget: int, overlap: bool | Literal["auto"], batch_size: int) -> Choice:
    alone = None if overlap is True else cheapest_within(costs, budget, overlap=False)
    beside = None if overlap is False else cheapest_within(costs, budget, overlap=True)
    if beside is not None and (alone is None or costs.recomputed(beside) <= costs.recomputed(alone)):
        return beside
    if alone is not None:
        return alone
    least = costs.bytes(lowest_peak(costs, overlap is True))
    hint = 'recompute="peak"' + (" and overlap=True" if overlap is True else " and overlap off")
    if overlap is True:
        without = costs.bytes(lowest_peak(costs, False))
        hint += f"; with overlap off {amount(without)}"
        least_of_all = min(least, without)
    else:
        least_of_all = least
    raise MemoryBudgetError(
        f"no choice of recomputation fits a memory budget of {amount(budget)} at batch size {batch_size}: the least is "
        f"{amount(least)}, by {hint}, of which {amount(costs.base)} are parameters, buffers, optimizer state and the "
        "batch. Raise the budget or take a smaller batch",
        least_of_all,
    )

"""What each stage of a run would compute, hold and send: the step itself, run for every stage on fake tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._torch import storage_id
from ..distributed import Form, balanced_cuts, checked_cuts
from ..local_modules import Recompute
from ..local_sequential import LocalSequential
from ..memory.meter import BUFFERS, INPUTS, OPTIMIZER_STATE, PARAMETERS, rounded
from ..step import OptimizerFactory
from ..step.edges import followers, refuse_crossed
from ..step.module_costs import module_flops
from ..step.parameter_lists import listed
from .estimate import StepEstimate
from .planned_stage import PlannedStage


@dataclass(frozen=True)
class StageCost:
    """One process of a stage, in bytes and FLOPs per batch.

    Attributes:
        modules: its first and last local module.
        parameters: with buffers.
        optimizer_state: of its parameters.
        in_flight: features in messages, between two steps: received ahead, and sent.
        batch: inputs and targets.
        gradients: alive at a time, at most.
        step: what is alive at the peak of a step beyond all that is between two steps: activations and gradients; of
            sharded parameters one module's are whole.
        flops: of convolutions and matrix products.
        sends: to the next stage.
        averages: gradients and buffers that its replicas average.
    """

    modules: tuple[int, int]
    parameters: int
    optimizer_state: int
    in_flight: int
    batch: int
    gradients: int
    step: int
    flops: int
    sends: int
    averages: int

    @property
    def peak(self) -> int:
        return self.parameters + self.optimizer_state + self.in_flight + self.batch + self.step


@dataclass(frozen=True)
class StagePlan:
    """The stages of a run; ``str()`` is a table.

    Attributes:
        stages: in order.
        replicas: of each stage.
        sharded: whether parameters, gradients and optimizer state are divided among replicas.
        batch_size: images per step of each replica.
    """

    stages: tuple[StageCost, ...]
    replicas: int
    sharded: bool
    batch_size: int

    @property
    def cuts(self) -> tuple[int, ...]:
        """The first local module of every stage but the first, as ``LocalStep(stage_cuts=...)`` takes them."""
        return tuple(stage.modules[0] for stage in self.stages[1:])

    @property
    def balance(self) -> float:
        """FLOPs of the costliest stage over those of an average one: 1 if all are equal."""
        flops = [stage.flops for stage in self.stages]
        return max(flops) * len(flops) / max(1, sum(flops))

    @property
    def speedup(self) -> float:
        """Of the stages over one process, at most: all FLOPs over those of the costliest stage."""
        return len(self.stages) / self.balance

    def __str__(self) -> str:
        total = max(1, sum(stage.flops for stage in self.stages))
        head = ("stage", "modules", "parameters", "optimizer", "gradients", "activations", "in flight", "batch", "peak")
        rows: list[tuple[str, ...]] = [(*head, "GFLOPs", "share", "sends", "averages")]
        for index, stage in enumerate(self.stages):
            first, last = stage.modules
            sizes = (stage.parameters, stage.optimizer_state, stage.gradients, stage.step, stage.in_flight, stage.batch)
            rows.append(
                (
                    str(index),
                    str(first) if first == last else f"{first}-{last}",
                    *(f"{size:,}" for size in (*sizes, stage.peak)),
                    f"{stage.flops / 1e9:,.3f}",
                    f"{stage.flops / total:.1%}",
                    *(f"{size:,}" for size in (stage.sends, stage.averages)),
                )
            )
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        table = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        replicas = f" of {self.replicas} replicas" if self.replicas > 1 else ""
        sharded = ", sharded" if self.sharded else ""
        processes = f"{len(self.stages)} stages{replicas}{sharded}"
        return "\n".join(
            [
                f"{processes}: predicted bytes per process, batch size {self.batch_size}"
                + (" of each replica" if self.replicas > 1 else ""),
                *table,
                "activations: alive at the peak beyond what is alive between steps, gradients included. Library "
                "workspaces are not counted",
                f"FLOPs of the costliest stage are {self.balance:.2f} times the average: at most {self.speedup:.2f} "
                f"times as fast as one process (stage_cuts={self.cuts})",
            ]
        )


def plan_stages(
    net: LocalSequential,
    batch_size: int,
    optimizer: OptimizerFactory,
    *,
    stages: int,
    replicas: int = 1,
    shard: bool = False,
    stage_cuts: Sequence[int] | None = None,
    params: Iterable[Any] | None = None,
    autocast: torch.dtype | None = None,
    recompute: Recompute | Sequence[Recompute] | None = None,
) -> StagePlan:
    """What the processes of ``LocalStep(mesh=...)`` would compute, hold and send, without a process group or a GPU.

    Each stage runs the step on fake tensors with the messages that it would hold, so on a CPU the predicted peak is
    what the meter reads in a real run, to the byte. ``net`` is not changed.

    With ``shard`` a process holds its part of every parameter, gradient and optimizer state: the first ``ceil(n / R)``
    of n rows. At the peak one module's parameters are whole besides.

    Args:
        net: the network, on any device, or built of fake tensors.
        batch_size: images per call of each replica.
        optimizer, params, autocast, recompute: as for :class:`auglocal_ext.LocalStep`.
        stages: how many.
        replicas: of each stage.
        shard: divide parameters among the replicas.
        stage_cuts: the first local module of every stage but the first; None for stages of about equal FLOPs.

    Raises:
        ValueError: for numbers of stages or replicas that cannot be, wrong cuts, and rules that read parameters of
            other modules.
    """
    for name, value in (("batch_size", batch_size), ("stages", stages), ("replicas", replicas)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
    if shard and replicas < 2:
        raise ValueError("shard divides parameters among replicas, of which there is one: pass replicas=")
    if stages > net.num_modules:
        raise ValueError(f"{stages} stages need as many local modules, and the network has {net.num_modules}")
    if stages > 1:
        _refuse_edges(net)
    if stage_cuts is None:
        stage_cuts = balanced_cuts(module_flops(net, optimizer, recompute), stages)
    cuts = checked_cuts(stage_cuts, stages, net.num_modules)
    refuse_crossed(net.local_modules, cuts)
    bounds = [0, *cuts, net.num_modules]
    kept = [module.kept for module in net.local_modules]
    params = list(net.parameters()) if params is None else listed(params)
    found: list[StageCost] = []
    arriving: list[Form] | None = None
    for first, end in zip(bounds, bounds[1:], strict=False):
        stage = PlannedStage(first, end - 1, kept, arriving, end < net.num_modules, replicas)
        options: dict[str, Any] = {"params": params, "autocast": autocast, "clip_norm": None, "clip": "module"}
        estimate = StepEstimate(net, batch_size, optimizer, accumulate=1, stage=stage, **options)
        found.append(_cost(estimate, stage, net.recompute if recompute is None else recompute, shard))
        arriving = stage.leaving
    return StagePlan(tuple(found), replicas, shard, batch_size)


def _cost(estimate: StepEstimate, stage: PlannedStage, recompute: Any, shard: bool) -> StageCost:
    # Among replicas a module's update runs beside the next module, which no stand-in knows.
    cost = estimate.cost(recompute, alike=stage.replicas is None)
    in_flight = _bytes(stage.messages)
    peak = max(cost.end, *(module.peak for module in cost.modules))
    alive = estimate.categories
    parameters, buffers, state = alive[PARAMETERS], alive[BUFFERS], alive[OPTIMIZER_STATE]
    step, gradients = peak - cost.base, estimate.gradients
    if shard:
        assert stage.replicas is not None
        ranks = stage.replicas.size
        parameters = sum(_part(p, ranks) for p in estimate.parts.parameters())
        state = sum(_state_bytes(estimate.optimizer, ranks))
        step += max(sum(rounded(p.nbytes) for p in module.parameters()) for module in estimate.local_modules)
        gradients = -(-gradients // ranks)
    return StageCost(
        modules=(stage.first, stage.last),
        parameters=parameters + buffers,
        optimizer_state=state,
        in_flight=in_flight,
        batch=alive[INPUTS] - in_flight,
        gradients=gradients,
        step=step,
        flops=sum(module.flops for module in cost.modules),
        sends=stage.sent,
        averages=0 if stage.replicas is None else sum(stage.replicas.messages.values()),
    )


def _part(tensor: Tensor, ranks: int) -> int:
    """Bytes of the first of as many parts as ``fully_shard`` makes: rows, of the first axis."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return rounded(tensor.nbytes)
    return rounded(-(-len(tensor) // ranks) * (tensor.nbytes // len(tensor)))


def _state_bytes(optimizer: torch.optim.Optimizer, ranks: int) -> Iterator[int]:
    for parameter, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, Tensor):
                yield _part(value, ranks) if value.shape == parameter.shape else rounded(value.nbytes)


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {storage_id(tensor.untyped_storage()): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(map(rounded, storages.values()))


def _refuse_edges(net: LocalSequential) -> None:
    for module, part in followers(net.local_modules):
        raise ValueError(
            f"{type(part).__name__} of local module {module.index} reads parameters of later layers, whose messages "
            "are not planned: plan this rule in one stage"
        )

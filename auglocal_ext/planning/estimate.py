"""What each local module of a training step holds at most, and computes, for each choice of recomputation."""

from __future__ import annotations

import traceback
from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._torch import DataDependentOutputException, storage_id
from ..cost import FlopMeter
from ..local_modules import LocalModule, OneStream, PassModule, Recompute
from ..local_sequential import LocalSequential
from ..memory import MemoryMeter
from ..memory.copies import FakeCopy, fake_mode_of
from ..memory.meter import rounded
from ..segments import carried
from ..step.empty_batch import empty_batch, explained_targets
from ..step.memory_plan import FUSED_ON_CPU
from ..step.optimizers import ModuleOptimizers, OptimizerFactory
from ..step.parameter_lists import held
from ..step.updates import Clip, Updates, updating_pass
from .planned_stage import PlannedStage
from .stand_in import StandIn, StandIns, likeness_of, likenesses_of_layers


@dataclass(frozen=True)
class ModuleCost:
    """One local module in one step, in bytes and FLOPs.

    Attributes:
        before: live when it begins; its input and what the pass keeps so far are in it.
        added: how much more is live at its peak.
        input: bytes of its input and what crosses the cut beside it; 0 for the first, whose input is the batch.
        flops: of forward, backward and recomputation.
    """

    before: int
    added: int
    input: int
    flops: int

    @property
    def peak(self) -> int:
        """Live bytes at the module's peak, one module after the other."""
        return self.before + self.added


@dataclass(frozen=True)
class StepCost:
    """A step whose modules recompute as they were told.

    Attributes:
        base: bytes live between steps: parameters, buffers, optimizer state, the batch, kept gradients.
        modules: the local modules in order.
        end: peak after the last module: where one optimizer step over everything is.
    """

    base: int
    modules: tuple[ModuleCost, ...]
    end: int


class StepEstimate:
    """A training step of ``net`` on fake tensors: :meth:`cost` runs it once, without a GPU and without its memory.

    Nothing of ``net`` is changed, no value is read and no random number drawn. The step runs as on a CPU, but the
    optimizer in the form that it takes on the device of ``net``: fused, which has no temporaries, foreach, or a
    for-loop, which has temporaries of one parameter. Library workspaces, a captured step's copy of the batch, and the
    two scalars of a loss scaler are not counted.

    Args:
        net: the network.
        batch_size: images per call.
        optimizer, params, autocast, clip_norm, clip, accumulate: as :class:`auglocal_ext.step.LocalStep` has them.
        stage: runs its modules alone, on features of the form that it receives; None for all.

    Attributes:
        parts: the modules that hold what runs.
        optimizer: of their parameters.
        gradients: bytes of gradients that are alive when a module's are finished, at most.
        categories: bytes live between steps, by :data:`auglocal_ext.memory.CATEGORIES`, once :meth:`cost` has run.

    Raises:
        ValuesReadBackError: if the network or the optimizer reads values of tensors, of which there are none.
    """

    def __init__(
        self,
        net: LocalSequential,
        batch_size: int,
        optimizer: OptimizerFactory,
        *,
        params: list[Any],
        autocast: torch.dtype | None,
        clip_norm: float | None,
        clip: Clip,
        accumulate: int,
        stage: PlannedStage | None = None,
    ) -> None:
        self._stage = stage
        self.categories: dict[str, int] = {}
        self._mode = fake_mode_of(net)
        self._autocast = autocast
        with self._mode:
            fake = FakeCopy(net)
            self._net = fake.net
            self._first = 0
            groups, self.parts = fake.groups(params), cast("nn.Module", fake.net)
            if stage is not None:
                self._first = stage.first
                self.parts = nn.ModuleList([fake.net.task, *(p for m in self.local_modules for p in m.parts())])
                groups = held(groups, self.parts, {id(p) for p in fake.net.parameters()})
            self._optimizers = ModuleOptimizers(self.local_modules, optimizer, groups)
            replicas = None if stage is None else stage.replicas
            _fit_to_fake(self._optimizers.whole, next(net.parameters()).is_cuda, may_shard=replicas is not None)
            # Of more calls than two, all but the last are alike.
            self._updates = _NotingUpdates(self._optimizers, None, clip_norm, clip, min(accumulate, 2), replicas)
            self._x, self._y = empty_batch(fake.net, batch_size)
            self._all_gradients = True
            for _ in range(self._updates.accumulate):  # makes the optimizer's state, and the gradients that are kept
                self._first_call()
            parameters = [id(p) for module in self.local_modules for p in module.parameters()]
            self._all_gradients = self._updates.all_at_once or len(set(parameters)) < len(parameters)
            self._all_gradients |= replicas is not None

    @property
    def gradients(self) -> int:
        return self._updates.most

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizers.whole

    @property
    def local_modules(self) -> tuple[LocalModule, ...]:
        """Those that run, on fake tensors."""
        modules = self._net.local_modules
        return modules if self._stage is None else modules[self._stage.first : self._stage.last + 1]

    def cost(self, recompute: Recompute | Sequence[Recompute], *, alike: bool = True) -> StepCost:
        """The step with this recomputation, of all modules or one for each.

        Args:
            alike: let modules that are alike run once (:mod:`auglocal_ext.planning.stand_in`); the result is the same.
        """
        with self._mode:
            self._net.recompute = recompute
            for _ in range(self._updates.accumulate - 1):
                self._call(alike=True)
            with FlopMeter() as flops, MemoryMeter() as meter:  # the meter is the inner one: it sees every operator
                meter.track(self.parts, self._optimizers.whole, self._x, self._y)
                if self._stage is not None:
                    meter.track(self._stage.messages)
                base, self.categories = meter.live_bytes, meter.live_categories
                watch = _Watch(meter, flops, self._first, self._stage)
                model = self._call(alike, watch).model
            return watch.cost(base, model)

    def likenesses_of_layers(self) -> list[list[Hashable]]:
        """For each local module and layer, what equals that of layers that do the same work on inputs of its shape."""
        network = self._net.network
        shapes = [network.input_shape, *(layer.shape for layer in network.layers)]
        begins = [0, *(end + 1 for end in network.ends)]
        found: list[list[Hashable]] = []
        for module in self.local_modules:
            likenesses = likenesses_of_layers(module, self._optimizers)
            found.append(list(zip(likenesses, shapes[begins[module.index] :], strict=False)))
        return found

    def checked(self, recompute: Recompute | Sequence[Recompute]) -> tuple[Recompute, ...]:
        """The recomputation of each module; ValueError for one that the network or a part of it cannot honour."""
        self._net.recompute = recompute
        return self._net.recompute

    def _first_call(self) -> None:
        try:
            with explained_targets(self._net.task, self._y, "memory is planned"):
                self._call(alike=True)
        except DataDependentOutputException as error:
            way = "change its forward pass"
            who = "the network"
            if _raised_by_an_optimizer(error):
                who, way = type(self.optimizer).__name__, "predict with another optimizer that has as much state"
            raise ValuesReadBackError(
                f"memory is predicted without data, but {who} reads values of tensors ({error}): {way}, or train "
                'without a plan, with recompute="none", "auxiliary" or "all"'
            ) from error

    def _call(self, alike: bool, watch: OneStream | None = None) -> StandIns:
        self._optimizers.prepare()
        stand_ins = StandIns(self._all_gradients, self._updates.used)
        modules = [
            StandIn(module, likeness_of(module, self._optimizers) if alike else None, stand_ins)
            for module in self.local_modules
        ]
        streams = (OneStream() if self._stage is None else self._stage) if watch is None else watch
        relay = None if self._stage is None else self._stage.begin(modules, self._x)
        updating_pass(modules, self._x, self._y, self._updates, self._autocast, streams, relay)
        self._updates.count()
        return stand_ins


class ValuesReadBackError(ValueError):
    """The network or the optimizer reads values of tensors, and nothing can be predicted without data."""


def _raised_by_an_optimizer(error: BaseException) -> bool:
    frames = traceback.walk_tb(error.__traceback__)
    return any(isinstance(frame.f_locals.get("self"), torch.optim.Optimizer) for frame, _ in frames)


class _NotingUpdates(Updates):
    """Notes which parameters of each module have a gradient, and how many bytes of gradients are alive at most."""

    most = 0

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.used: dict[int, tuple[bool, ...]] = {}

    def take(self, module: PassModule, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        self.used[module.index] = tuple(gradient is not None for gradient in gradients)
        earlier = (p.grad for group in self.optimizers.whole.param_groups for p in group["params"])
        alive = {storage_id(g.untyped_storage()): g for g in (*gradients, *earlier) if g is not None}
        self.most = max(self.most, sum(rounded(g.untyped_storage().nbytes()) for g in alive.values()))
        super().take(module, parameters, gradients)


class _Watch(OneStream):
    """Notes where each module begins and what is live there."""

    def __init__(self, meter: MemoryMeter, flops: FlopMeter, first: int, stage: OneStream | None) -> None:
        self._meter = meter
        self._flops = flops
        self._first = first
        self._stage = OneStream() if stage is None else stage
        self._begins: list[tuple[int, int, int]] = []
        self._inputs: list[int] = [0]

    def module(self, index: int) -> AbstractContextManager[Any]:
        self._begin()
        return super().module(index)

    def handed_on(self, index: int, h: Tensor, history: Sequence[Tensor | None]) -> None:
        self._inputs.append(sum(each.untyped_storage().nbytes() for each in (h, *carried(h))))
        self._stage.handed_on(index, h, history)

    def join(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._begins.append((len(self._meter.timeline), self._meter.live_bytes, self._flops.flops))

    def cost(self, base: int, model: Mapping[int, int]) -> StepCost:
        """``model``: for each module, by index, the one that has run in its place."""
        added, flops = [], []
        ends = [*(start for start, _, _ in self._begins[1:]), len(self._meter.timeline)]
        for (start, live, _), end in zip(self._begins, ends, strict=True):
            added.append(max([live, *(bytes for _, bytes in self._meter.timeline[start:end])]) - live)
        for (_, _, first), (_, _, last) in zip(self._begins, self._begins[1:], strict=False):
            flops.append(last - first)
        ran = [model[self._first + k] - self._first for k in range(len(flops))]
        modules = tuple(
            ModuleCost(live, added[ran[k]], self._inputs[k], flops[ran[k]])
            for k, (_, live, _) in enumerate(self._begins[:-1])
        )
        return StepCost(base, modules, self._begins[-1][1] + added[-1])


def _fit_to_fake(optimizer: torch.optim.Optimizer, on_cuda: bool, may_shard: bool) -> None:
    """Have it step on fake CPU tensors in the form, fused or ``foreach``, that it takes on the network's device."""
    for options in (optimizer.defaults, *optimizer.param_groups):
        if options.get("capturable"):
            options["capturable"] = False
        if on_cuda and "fused" in options:  # as ModuleOptimizers chooses, but for shards
            left_open = options["fused"] is None and not options.get("foreach") and not options.get("differentiable")
            if left_open and not may_shard:
                options["fused"] = True
        elif on_cuda and options.get("foreach", False) is None:
            options["foreach"] = not options.get("differentiable")
        if options.get("fused") and not isinstance(optimizer, FUSED_ON_CPU):
            options["fused"] = False

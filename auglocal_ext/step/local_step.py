"""``LocalStep``: a training step over local modules that updates and releases each module at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor

from ..distributed import Mesh, StepTimes
from ..local_modules import LocalModule, LocalOutput, OneStream, Recompute
from ..local_sequential import LocalSequential
from ..ops import tuning
from . import checkpoint, in_flight
from .built_in import NetworkState
from .graph import Form, GraphedStep, Graphs, NotForGraphs, Way
from .memory_plan import MemoryPlan, step_facts
from .module_costs import costs_of_stages
from .optimizers import ModuleOptimizers, OptimizerFactory
from .overlap import TwoStreams
from .parameter_lists import held, listed, named_parameters, replaced
from .processes import Processes, StageCuts
from .refusals import (
    check_network,
    check_optimizer,
    check_plan,
    refuse_autocast_around_a_plan,
    refuse_former,
    refuse_unmeshed,
)
from .updates import Clip, Updates, guard_steps_by_hand, updating_pass

Switch = Literal[True, False, "auto"]


class LocalStep:
    """A training step: forward pass, local loss, backward pass and update, one local module after the other.

    ::

        step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9), autocast=torch.bfloat16)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(step.optimizer, epochs)
        for x, y in loader:
            out = step(x, y)

    The weights equal those of ``net(x, y).loss.backward(); optimizer.step()``, bit for bit with plain SGD on a CPU,
    because no module's backward pass reads the parameters of an earlier one. But only one module's gradients exist at a
    time, unless ``accumulate`` or ``clip`` needs all of them.

    The network must be in training mode, and batches on its device. On CUDA the step is captured as one graph after a
    few calls. A batch of another shape runs without the graph; the smaller last batch of an epoch gets a graph of its
    own from the second epoch on.

    Several processes train one network if they pass a ``mesh`` with a dimension ``"replica"``, ``"stage"``, or both::

        mesh = init_device_mesh("cuda", (stages, replicas), mesh_dim_names=("stage", "replica"))
        step = LocalStep(net, optimizer, mesh=mesh)

    Each process returns the losses and counts of its own local modules, on its own part of the batch.

    - *Replicas* split the batch. They start from the weights of the first one and average each module's gradients while
      the next module runs. All replicas have equal weight, as in DistributedDataParallel.
    - *Shards* (``shard=True``): replicas share parameters, gradients and optimizer state. A module's parameters are
      gathered before it runs. ``net.parameters()`` are then ``DTensor`` objects, not the ones from before.
    - *Stages* split the network. Each holds a run of local modules; the parameters of all others move to the meta
      device. All stages are called with the same batches, of which the first must be the largest. Weights equal those
      of one process, bit for bit on a CPU. Use :meth:`predict` in place of ``net(x)``, and call :meth:`close` at the
      end.
    - *Delay* (``delay=D``): in call i, stage s trains on the batch of call i - s D, so a stage that is late for a
      moment does not stop the next one. :meth:`drain` trains on the batches in flight. One process that is given the
      ``stage_cuts`` and the ``delay`` of such a run replays it, bit for bit on a CPU.

    Args:
        net: the network.
        optimizer: takes a list of parameters and returns an optimizer, of any class of ``torch.optim`` but LBFGS. On
            CUDA its fused and capturable forms are used, unless ``fused`` or ``foreach`` was set.
        params: parameter groups for ``optimizer``, for example one without weight decay; default all parameters.
        graph: ``"auto"`` captures where it can and records in :attr:`eager_reason` why not; True raises
            :class:`auglocal_ext.step.GraphCaptureError` instead; False never does.
        overlap: run the backward pass of module k beside the forward pass of module k + 1, on two CUDA streams. The
            activations of up to two modules are then alive. ``"auto"`` does as the ``plan`` says, and without one it
            is off.
        autocast: None leaves it to a surrounding ``torch.autocast``; ``torch.float16`` makes a ``GradScaler``.
        grad_scaler: a scaler of your own.
        clip_norm: largest 2-norm of gradients.
        clip: ``"module"`` clips the gradients of each local module separately; ``"global"`` clips all together and
            keeps all gradients until the end of the pass: as many bytes as the parameters.
        accumulate: calls per optimizer step; their gradients are averaged. Above 1 all gradients are kept.
        recompute: sets ``net.recompute``; None leaves it as it is.
        plan: what :func:`auglocal_ext.planning.plan_memory` returned for this network, optimizer and these options: it
            says what is recomputed, and whether modules overlap. A plan for another step raises, as do larger batches
            than planned, and without ``autocast`` a call inside ``torch.autocast``.
        memory_budget, batch_size: raise, and name ``plan``, which is made with them.
        mesh: a ``DeviceMesh``. Steps of several processes run eagerly, on one stream, and are not planned:
            ``graph=True``, ``overlap=True`` and ``plan`` raise. Over stages so do fp16, ``clip="global"`` and
            parameters that stages share.
        sync_batch_norm: BatchNorm uses the statistics of all replicas. Changes the class of the layers, see
            :func:`auglocal_ext.nn.sync_batch_norm`, and sends 2 C + 1 numbers per layer and pass.
        stage_cuts: the first local module of every stage but the first. None, or ``Balanced(by="flops")``, balances the
            stages' FLOPs. ``Balanced(by="time", batch_size=N)`` balances time: the first process measures seven steps
            of a copy of the network on N random inputs, and all processes use the cuts it finds. During that its device
            holds the whole network twice, with gradients and optimizer state of the copy.
        check_batches: stages compare the samples they are given, which reads a value from the device per batch. Without
            it they compare the number of samples, on CPUs only.
        gather_features: losses that compare samples (PredSim, InfoPro's contrast) see those of all replicas. Each
            replica gathers what is compared, N rows of C or D numbers per module and pass, and computes the loss of the
            whole batch. Parts may differ in size.
        shard: shard parameters, gradients and optimizer state over the replicas. Raises for optimizers that cannot step
            ``DTensor`` parameters, among them Adafactor, Rprop and the fused SGD, and for parameters that local modules
            share.
        delay: calls between making features and training on them, from one stage to the next; a multiple of
            ``accumulate``. Steps run eagerly. fp16, ``clip="global"``, ``graph=True``, ``overlap=True`` and ``plan``
            raise, in a replay too.

    Attributes:
        net: the network.
        grad_scaler: the scaler, or None.
        plan: the plan, or None.

    Raises:
        DisagreementError: in all processes, if they differ in the network, in options or in versions.
        RuntimeError: in a process group of more than one process without ``mesh``; for a network that another step has
            spread over stages or shards, or that your own ``fully_shard`` holds.
        TypeError: if ``net`` is no :class:`LocalSequential`, ``optimizer`` makes no optimizer, ``mesh`` is no mesh or
            ``plan`` no plan.
        ValueError: for an option out of range, a combination that is not supported, a plan that was made for another
            step, or an optimizer that cannot be stepped module by module.
    """

    def __init__(
        self,
        net: LocalSequential,
        optimizer: OptimizerFactory,
        *,
        params: Iterable[Any] | None = None,
        graph: Switch = "auto",
        overlap: Switch = "auto",
        autocast: torch.dtype | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        clip_norm: float | None = None,
        clip: Clip = "module",
        accumulate: int = 1,
        recompute: Recompute | Sequence[Recompute] | None = None,
        plan: MemoryPlan | None = None,
        memory_budget: None = None,
        batch_size: None = None,
        mesh: Mesh | None = None,
        sync_batch_norm: bool = False,
        stage_cuts: StageCuts = None,
        check_batches: bool = False,
        gather_features: bool = False,
        shard: bool = False,
        delay: int = 0,
    ) -> None:
        check_network(net)
        check_optimizer(optimizer)
        for name, switch in (("graph", graph), ("overlap", overlap)):
            if switch not in (True, False, "auto"):
                raise ValueError(f'{name} must be True, False or "auto", got {switch!r}')
        refuse_former(recompute, memory_budget, batch_size)
        check_plan(plan, recompute, overlap)
        self._meshed = mesh is not None
        refuse_unmeshed(self._meshed)
        if autocast not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"autocast must be None, torch.bfloat16 or torch.float16, got {autocast}")
        self.net = net
        self.plan = plan
        device = next(net.parameters()).device.type
        if device == "meta":
            if mesh is None:
                raise ValueError(
                    "the network is on the meta device: call net.materialise(device) first, or pass mesh= "
                    "among several processes"
                )
            device = mesh.device_type
        if autocast == torch.float16 and grad_scaler is None:
            grad_scaler = torch.amp.GradScaler(device)
        self.grad_scaler = grad_scaler
        self._processes = Processes(
            mesh,
            {
                "graph": graph,
                "overlap": overlap,
                "grad_scaler": grad_scaler,
                "clip_norm": clip_norm,
                "clip": clip,
                "accumulate": accumulate,
                "plan": plan,
                "sync_batch_norm": sync_batch_norm,
                "stage_cuts": stage_cuts,
                "check_batches": check_batches,
                "gather_features": gather_features,
                "shard": shard,
                "delay": delay,
            },
        )
        params = list(net.parameters()) if params is None else listed(params)
        everywhere = {id(p) for p in net.parameters()}
        if shard:  # by name, as each whole parameter is released once it is sharded
            named = {id(p): name for name, p in net.named_parameters()}
            params = replaced(params, lambda p: named.get(id(p), p))
        settings: dict[str, Any] = {
            "autocast": autocast,
            "clip_norm": clip_norm,
            "clip": clip,
            "accumulate": accumulate,
        }
        costs = partial(costs_of_stages, net, optimizer, recompute=recompute, options={"params": params, **settings})
        self._modules = self._processes.place(net, stage_cuts, costs)
        if shard:
            params = named_parameters(net, params)
            everywhere = {id(p) for p in net.parameters()}
        if self._processes.stage is not None:
            params = held(params, net, everywhere)
        self._parameters = [p for p in net.parameters() if not p.is_meta]
        self._network_state = NetworkState(list(net.modules()), self._parameters, gradients=accumulate > 1)
        self._optimizers = ModuleOptimizers(self._modules, optimizer, params)
        if shard:
            self._optimizers.refuse_shards()
        if plan is not None:
            plan.check(step_facts(net, self._optimizers.whole, **settings))
        agreed = {**settings, "autocast": str(autocast), "grad_scaler": grad_scaler is not None}
        self._processes.meet(net, self._optimizers.whole, agreed)
        self._updates = Updates(self._optimizers, grad_scaler, clip_norm, clip, accumulate, self._processes.replicas)
        guard_steps_by_hand(self._updates)
        if plan is not None:
            net.recompute = plan.recompute
        elif recompute is not None:
            net.recompute = recompute
        self._autocast_dtype = autocast
        self._overlap = overlap is True if plan is None else plan.overlap
        eagerly = graph is False or self._processes.eager_reason is not None
        self._graphs = None if eagerly else Graphs(graph is True, warmup=2, phases=accumulate)
        self._streams = OneStream()
        self._second: torch.cuda.Stream | None = None
        self._draws = False  # random numbers in a step, as dropout does
        self._batches = 0  # calls so far

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """One ordinary optimizer of your class, for schedulers and checkpoints.

        Its ``step()`` does nothing after a call that has :attr:`updated` the parameters, so a framework may call it to
        count steps; within an accumulation it raises RuntimeError.
        """
        return self._optimizers.whole

    @property
    def updated(self) -> bool:
        """Whether the last call updated the parameters: each does, with ``accumulate`` above 1 the last of as many."""
        return self._updates.updated

    @property
    def graphed(self) -> bool:
        """Whether the last step ran as a CUDA graph."""
        return self.eager_reason is None

    @property
    def eager_reason(self) -> str | None:
        """Why the last step did not run as a CUDA graph; None if it did."""
        if self._processes.eager_reason is not None:
            return self._processes.eager_reason
        return "graph=False" if self._graphs is None else self._graphs.reason

    @property
    def times(self) -> StepTimes | None:
        """Where this process's time went: work, waiting, sending, averaging. None for one process, and on CUDA."""
        return self._processes.times

    def __call__(self, x: Tensor, y: Tensor) -> LocalOutput:
        """Train on one batch.

        Args:
            x: inputs ``(N, *input_shape)``, floating point.
            y: targets of the network's task, as ``net(x, y)`` takes them.

        Returns:
            The output of the pass, all of it detached; with ``delay`` a :class:`auglocal_ext.step.DelayedOutput`.

        Raises:
            TypeError, ValueError: for a bad batch, as ``net(x, y)`` does, for a larger one than planned, and for a
                surrounding autocast that was not planned, before anything is changed.
            GraphCaptureError: with ``graph=True`` if the step cannot be captured; nothing is changed.
            RuntimeError: if another process fails, or after a step of several processes that broke off in this one.
        """
        refuse_unmeshed(self._meshed)
        self._processes.refuse_broken()
        if self.plan is not None:
            self.plan.check_batch(len(x))
            refuse_autocast_around_a_plan(self._autocast_dtype)
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            way = self._way(x, y)
            if isinstance(way, GraphedStep):
                out = LocalOutput(*way(x, y))
            else:
                with nullcontext() if self._graphs is None else self._graphs.around(way, self._running):
                    out = self._eagerly(x, y)
        self._updates.count()
        self._batches += 1
        return out

    def predict(self, x: Tensor) -> Tensor | None:
        """Output of the network for ``x``, in the network's mode and without gradients.

        To be called in all stages, and with ``shard=True`` in all replicas, each with an ``x`` of its own.

        Returns:
            ``(N, outputs)``; None in all stages but the last.
        """
        self.net.refuse_empty()
        if self._processes.stage is None and self._processes.shards is None:
            with torch.no_grad():
                return cast("Tensor", self.net(x))
        self.net.check_input(x)
        return self._processes.predict(self._local_modules(), x)

    @property
    def stage_cuts(self) -> tuple[int, ...]:
        """The first local module of every stage but the first; empty where the network is not cut into stages."""
        return self._processes.cuts

    def drain(self) -> list[LocalOutput]:
        """With ``delay``, train on the batches in flight until every stage has trained on every batch.

        Call it in all stages at the end of a run, or before weights are compared or published. The next call begins a
        new run, in which later stages wait for the first batches again. Learning rates stay as they are.

        Returns:
            An output for each call that this takes: ``delay`` times the number of stages minus one. Empty without a
            delay, and if nothing is in flight.
        """
        self._processes.refuse_broken()
        pipeline = self._processes.pipeline
        if pipeline is None:
            return []
        outs, device = [], self._parameters[0].device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            for _ in range(pipeline.calls_to_drain):
                outs.append(self._eagerly())
                self._updates.count()
            pipeline.drained()
        return outs

    def close(self) -> None:
        """End a run over stages; call it in all of them, before the processes end.

        Each stage has requested the features of a batch that will not come. With ``delay`` the batches in flight are
        trained on first, see :meth:`drain`, unless a step broke off. A further call begins a new run.
        """
        pipeline = self._processes.pipeline
        if pipeline is not None:
            if self._processes.broken_by is None:
                self.drain()
            pipeline.restart(pipeline.course.begun)

    def _local_modules(self) -> tuple[LocalModule, ...]:
        stage = self._processes.stage
        modules = self.net.local_modules
        return modules if stage is None else modules[stage.first : stage.last + 1]

    def state_dict(self) -> dict[str, Any]:
        """State of optimizer and scaler, and the providers that ops have chosen in this process.

        Gradients of an unfinished accumulation are not part of it.

        Among stages this is the state of one stage, and with ``shard=True`` that of one process's shards: :meth:`save`
        writes all of it.

        Raises:
            RuntimeError: with batches in flight (``delay``), and over stages for a rule that follows older parameters.
                :meth:`save` writes both.
        """
        run = in_flight.state_dict(self._processes.where(self.net), self._processes.stage is not None)
        state = {"optimizer": self.optimizer.state_dict(), "grad_scaler": self._scaler_state()}
        return {**state, "providers": tuning.decided(), **run}

    def _scaler_state(self) -> dict[str, Any] | None:
        return None if self.grad_scaler is None else self.grad_scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; ``state["optimizer"]`` may be that of an ordinary optimizer.

        With ``shard=True`` its tensors may be whole; this process keeps its shards. Ops in this process use the saved
        providers from now on, where they are available.

        Raises:
            RuntimeError: with batches in flight.
        """
        place = self._processes.where(self.net)
        in_flight.refuse(place, "call step.drain() first")
        in_flight.load_state_dict(place, state)
        self._load_state(state)

    def _load_state(self, state: dict[str, Any]) -> None:
        self._optimizers.load(state["optimizer"])
        if self.grad_scaler is not None and state.get("grad_scaler") is not None:
            self.grad_scaler.load_state_dict(state["grad_scaler"])
        # An older version did not save them.
        if tuning.adopt(state.get("providers") or {}) and self._graphs is not None:
            self._graphs.outdate()
        self._updates.drop()

    def save(self, folder: str | os.PathLike[str], extra: Mapping[str, Any] | None = None) -> None:
        """Save network, optimizer, scaler and providers; call it in all processes, after the same batch.

        Names do not depend on stages and replicas: :meth:`load` works with any number of processes. Each tensor is
        written once, by torch.distributed.checkpoint. The state of random number generators is not saved. With
        ``delay`` the batches in flight are saved, and :meth:`load` needs the same delay, stages and replicas unless
        :meth:`drain` has run.

        Args:
            folder: on a file system that all processes share. A checkpoint that exists there is replaced once the new
                one is complete, and left intact until then.
            extra: anything else to save, such as an epoch and a scheduler's state: numbers, strings, tensors, lists,
                tuples and dicts. That of the first process is saved.

        Raises:
            CheckpointError: in all processes, if one of them fails.
            RuntimeError: within an accumulation, whose gradients would be lost.
            TypeError: if ``extra`` is no dict.
        """
        if extra is not None and not isinstance(extra, Mapping):
            raise TypeError(f'extra is a dict of what else to save, such as {{"epoch": 3}}; got {type(extra).__name__}')
        if self._updates.calls:
            raise RuntimeError(
                f"{self._updates.calls} of {self._updates.accumulate} calls of an optimizer step are done, and their "
                "gradients are not saved: save after the last"
            )
        rest = {"grad_scaler": self._scaler_state(), "extra": dict(extra or {})}
        where = {"the number of batches": self._batches}
        place = self._processes.where(self.net)
        checkpoint.save(folder, self.net, self.optimizer, rest, where, place, self._processes.world())

    def load(self, folder: str | os.PathLike[str]) -> dict[str, Any]:
        """Load this process's part of a checkpoint written by :meth:`save`; call it in all processes.

        Without a scaler in the checkpoint, this step's keeps its state. torch.distributed.checkpoint unpickles its list
        of tensors: load only checkpoints that you trust.

        Returns:
            The ``extra`` of :meth:`save`.

        Raises:
            CheckpointError: in all processes, if one does not find the checkpoint, or if it is of another network,
                rule, task or optimizer. Nothing is changed then. Also if a file is damaged; the network may then be
                partly loaded.
        """
        place = self._processes.where(self.net)
        optimizer, rest = checkpoint.load(folder, self.net, self.optimizer, place, self._processes.world())
        self._load_state({"optimizer": optimizer, **{name: rest.get(name) for name in ("grad_scaler", "providers")}})
        self.net.empty = False
        if self._processes.alone:
            self._processes.broken_by = None  # the stages of a replay are in order again
        return cast("dict[str, Any]", rest["extra"])

    def _way(self, x: Tensor, y: Tensor) -> GraphedStep | Way:
        """The captured step for this batch, or how to run it without one; the batch is checked for it."""
        if self._processes.stage is not None:
            self._processes.stage.check(len(x))
        if self._graphs is None:
            self.net.check_batch(x, y, merged=self._processes.synced)
            return Way.EAGER
        recomputes = any(choice != "none" for choice in self.net.recompute)
        obstacle = "recomputed modules draw random numbers (dropout)" if recomputes and self._draws else None
        if any(not followed.immediate for module in self._modules for followed in module.followed):
            obstacle = "auxiliary networks read parameters of earlier steps"
        way = self._graphs.find(x, lambda: self._built_in(x.device), Form.of(x, y), self._updates.due, obstacle)
        self.net.check_batch(x, y, values=isinstance(way, Way))  # a graph counts bad targets itself
        if way is Way.CAPTURE:
            return self._graphs.capture(lambda *where: self._captured(x, y, *where), self._running) or Way.EAGER
        return way

    def _captured(self, x: Tensor, y: Tensor, pool: Any, stream: Any) -> GraphedStep:
        try:
            return GraphedStep(self._run, x, y, self._optimizers, self.net, pool, stream)
        except NotForGraphs:
            raise  # nothing has run
        except BaseException:
            if self._updates.accumulate == 1:
                self._updates.drop()
            self._optimizers.forget_views()
            raise

    def _built_in(self, device: torch.device) -> tuple[Any, ...]:
        """What a captured step does not read anew: if any of it changes, it must be captured again."""
        return (
            self._optimizers.options(),
            self.net.recompute,
            torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
            *self._network_state.read(),
        )

    def _running(self) -> str:
        return "the step" if self._streams.current is None else f"local module {self._streams.current}"

    def _eagerly(self, *batch: Tensor) -> LocalOutput:
        """A step; without a batch, one that trains on those in flight."""
        if self.grad_scaler is None and batch:
            self.net.warn_of_fp16(batch[0])
        self._optimizers.prepare()
        device = self._parameters[0].device
        before = _random_position(device)
        try:
            with self._processes.timed():
                out = self._run(*batch)
        except BaseException as error:
            self._processes.broken_by = f"{type(error).__name__}: {error}"
            self._updates.drop()
            self._optimizers.forget_views()
            raise
        self._draws = _random_position(device) != before
        return out

    def _run(self, *batch: Tensor) -> LocalOutput:
        """The step itself, eager or under capture."""
        modules, pipeline = self._local_modules(), self._processes.pipeline
        if pipeline is not None:
            given = (batch[0], batch[1]) if batch else None
            return pipeline.run(modules, given, self._updates, self._autocast_dtype, self._parameters[0])
        x, y = batch
        self._streams = OneStream()
        if self._overlap and x.is_cuda:
            if self._second is None or self._second.device != x.device:
                # One for all steps: libraries and the allocator keep memory for every stream they have met.
                self._second = torch.cuda.Stream(x.device)
            self._streams = TwoStreams(x.device, self._second)
        if not self._processes.alone:
            self._streams = self._processes.streams(modules)
        try:
            with self._processes.region(len(x), self._batches):
                out = updating_pass(modules, x, y, self._updates, self._autocast_dtype, self._streams)
        except BaseException:
            # A capture ends with its first stream alone. One that CUDA has broken off does not let them join.
            with suppress(RuntimeError):
                self._streams.join()
            raise
        return out._replace(loss=out.loss.detach())


def _random_position(device: torch.device) -> int | None:
    """How many random numbers were drawn on a CUDA device; a recomputation in a graph could not draw them again."""
    if device.type != "cuda":
        return None
    return torch.cuda.default_generators[device.index or 0].get_offset()

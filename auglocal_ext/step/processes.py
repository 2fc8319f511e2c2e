"""What ``LocalStep`` does among several processes: its replicas, its shards and its stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..distributed import (
    Mesh,
    Replicas,
    Shards,
    Stage,
    StepTimes,
    agree,
    balanced_cuts,
    checked_cuts,
    cut_numbers,
    group_like,
    mesh_groups,
    shapes_of,
)
from ..local_modules import LocalModule, OneStream, Relay
from ..local_sequential import LocalSequential
from ..nn import gathered_features, refuse_sharding, sync_batch_norm, synced_statistics
from ..ops import tuning
from ..partition import Balanced
from .agreement import checksum, facts_of, options_of, told_by_first
from .edges import Edges, crossings
from .in_flight import Place
from .pipeline import Boundaries, Pipeline, Queued, Sent, passing
from .refusals import (
    check_delay,
    check_options,
    refuse_followed_shards,
    refuse_nothing_to_gather,
    refuse_old_shards,
    refuse_other_devices,
    refuse_shared_parameters,
)

StageCuts = Sequence[int] | Balanced | None


class Processes:
    """This process's role among those that train one network; without a mesh it is the only one.

    Args:
        mesh: as :class:`auglocal_ext.LocalStep` has it.
        options: of the step, by name; those that several processes cannot honour raise.

    Attributes:
        alone: whether no other process takes part.
        stage: this process's local modules; None where it has all.
        replicas: over which gradients are averaged, once :meth:`meet` has run; None where there is one.
        shards: the replicas, where they share the parameters; None where each has all of them.
        synced: whether BatchNorm takes its statistics over all replicas.
        broken_by: what a step of this process broke off with.
        pipeline: this process's stages in a run; None where the network is not cut into stages.
        cuts: the first local module of every stage but the first.
        times: of the steps; None for one process, and on CUDA, where the host's clock says little.
    """

    def __init__(self, mesh: Mesh | None, options: dict[str, Any]) -> None:
        self._mesh = mesh
        self._stages, self._group = (None, None) if mesh is None else mesh_groups(mesh)
        self._replica = 0 if self._group is None else torch.distributed.get_rank(self._group)
        self.alone = self._stages is None and self._group is None
        if not self.alone:
            tuning.forget()  # what this process chose by itself, others may have chosen otherwise
        self.stage: Stage | None = None
        self.replicas: Replicas | None = None
        self.shards: Shards | None = None
        self.broken_by: str | None = None
        on_host = mesh is not None and mesh.device_type == "cpu"
        self.times = StepTimes() if on_host and not self.alone else None
        self._world: Any | None = None
        self.pipeline: Pipeline | None = None
        self.cuts: tuple[int, ...] = ()
        self.synced, self._check_batches = options.pop("sync_batch_norm"), options.pop("check_batches")
        self._shard, self._delay = options.pop("shard"), options.pop("delay")
        self._gathers, self._hosts = options.pop("gather_features"), None
        asked_of_replicas = {"sync_batch_norm": self.synced, "gather_features": self._gathers, "shard": self._shard}
        for name, asked in asked_of_replicas.items():
            if asked and self._group is None:
                raise ValueError(f"{name}=True is for several replicas: pass mesh=, or leave it out")
        check_delay(self._delay, self._stages is not None, options)
        if self._stages is None and self._check_batches:
            raise ValueError("check_batches=True is for several stages: pass a mesh that has them, or leave it out")
        check_options(options, self.alone, self._stages is not None)

    def place(
        self, net: LocalSequential, cuts: StageCuts, costs: Callable[[Balanced], Sequence[float]]
    ) -> tuple[LocalModule, ...]:
        """The local modules of this process; all others are moved to the meta device.

        Its own get memory on the mesh's device, where they are on the meta device, and are sharded if asked for.

        Args:
            cuts: the first local module of every stage but the first, or how to balance them; None balances FLOPs.
            costs: returns what each local module costs, in FLOPs or in time.
        """
        modules = net.local_modules
        if net.held is not None:
            raise RuntimeError(
                f"this process holds local modules {net.held[0]} to {net.held[1]} of the network, which another "
                "LocalStep has spread over stages: go on with that step, or wrap the network anew"
            )
        if net.sharded:
            raise RuntimeError(
                "another LocalStep has sharded this network: go on with that step, or wrap the network anew"
            )
        refuse_other_devices(net, None if self._mesh is None else self._mesh.device_type)
        if self._stages is None:
            self._settle(net, modules)
            if cuts is not None:
                if isinstance(cuts, Balanced):
                    raise ValueError(
                        f"one process replays the stages of a run by their stage_cuts, such as (4, 9); got {cuts!r}"
                    )
                self._replay(net, checked_cuts(cuts, None, len(modules)))
            return modules
        cuts = cuts if cuts is None or isinstance(cuts, Balanced) else cut_numbers(cuts)
        self._agree({**facts_of(net), "stage_cuts": cuts, "delay": self._delay})
        count = torch.distributed.get_world_size(self._stages)
        if len(modules) < count:
            raise ValueError(f"{count} stages need as many local modules, and the network has {len(modules)}")
        cuts = Balanced(by="flops") if cuts is None else cuts
        if isinstance(cuts, Balanced):
            cuts = self._balanced(cuts, costs, count)
        cuts = checked_cuts(cuts, count, len(modules))
        found = crossings(net, cuts)
        if self._shard:
            refuse_old_shards(found)
        # Replicas of a stage take the first one's weights.
        self._agree({"stage_cuts": cuts, "the initial weights (another seed?)": checksum(net)}, self._replica)
        kept = [module.kept for module in modules]
        self.stage = Stage(self._stages, cuts, len(modules), kept, self._check_batches, self._delay)
        net.hold(self.stage.first, self.stage.last)
        ours = net.local_modules[self.stage.first : self.stage.last + 1]
        self._settle(net, ours)
        assert self._mesh is not None
        device = next((p.device for p in net.parameters() if not p.is_meta), torch.device(self._mesh.device_type))
        edges = Edges(self._stages, found, device, self._mesh["replica"] if self._shard else None)
        self._cut(net, cuts, [self.stage.index], Sent(self.stage, device), edges)
        return ours

    def _settle(self, net: LocalSequential, modules: Sequence[LocalModule]) -> None:
        """Give this process's modules memory; with ``shard``, shard each before the next one gets memory."""
        if self._mesh is None:
            return
        refuse_sharding(net)
        if not self._shard:
            net.materialise(self._mesh.device_type)
            return
        refuse_shared_parameters(net, modules)
        refuse_followed_shards(net)
        ours = {id(t) for m in modules for part in m.parts() for t in (*part.parameters(), *part.buffers())}
        parameters = [(name, p) for name, p in net.named_parameters() if id(p) in ours]
        buffers = [(name, b) for name, b in net.named_buffers() if id(b) in ours]
        facts = {**facts_of(net), "shard": True}
        self._agree_within_stage(facts, [*parameters, *buffers])
        self.shards = shards = Shards(self._mesh["replica"], parameters, buffers, facts, net.modules())
        del parameters, buffers  # a whole parameter is freed once it is sharded

        def shard(module: LocalModule) -> None:
            body = [part for part in module.parts() if part is not module.auxiliary]
            shards.shard(module.index, body, [] if module.auxiliary is None else [module.auxiliary])

        net.materialise(self._mesh.device_type, shard)
        net.sharded = True
        net.spread("shards of the network")

    def _balanced(self, asked: Balanced, costs: Callable[[Balanced], Sequence[float]], count: int) -> tuple[int, ...]:
        if asked.modules not in (None, count):
            raise ValueError(f"stage_cuts={asked!r} asks for {asked.modules} stages, and the mesh has {count}")
        if asked.by == "memory":
            raise ValueError(
                f'stages are balanced by FLOPs or measured time: stage_cuts=Balanced({count}, by="flops") or '
                f'Balanced({count}, by="time", batch_size=...); got {asked!r}'
            )
        if asked.by == "time":  # which every process would measure otherwise
            return told_by_first(lambda: balanced_cuts(costs(asked), count), self.world())
        return balanced_cuts(costs(asked), count)

    def _agree(self, facts: dict[str, Any], among: Any = None) -> None:
        """DisagreementError in all stages and replicas, unless those with the same ``among`` say the same."""
        if self._stages is not None and self._group is not None:
            agree(facts, self.world(), "ranks", among)
        else:
            agree(facts, self._stages, "stages")

    def _agree_within_stage(self, facts: dict[str, Any], tensors: Sequence[tuple[str, Tensor]]) -> None:
        """DisagreementError in all stages if the replicas of one disagree: no other is to wait for them."""
        if self.stage is not None:
            self._agree({**facts, **shapes_of(tensors)}, self.stage.index)

    def _replay(self, net: LocalSequential, cuts: tuple[int, ...]) -> None:
        """Take all stages of a run over several into this process."""
        crossings(net, cuts)  # what several processes refuse is refused here too
        boundaries = Queued(cuts, [module.kept for module in net.local_modules])
        self._cut(net, cuts, range(len(cuts) + 1), boundaries, None)

    def _cut(
        self,
        net: LocalSequential,
        cuts: tuple[int, ...],
        stages: Sequence[int],
        boundaries: Boundaries,
        edges: Edges | None,
    ) -> None:
        self.cuts = cuts
        bounds = [0, *cuts, net.num_modules]
        spans = [(stage, bounds[stage], bounds[stage + 1] - 1) for stage in stages]
        self.pipeline = Pipeline(
            spans, len(cuts) + 1, self._delay, boundaries, edges, self.region, net.task, self.shards
        )

    def where(self, net: LocalSequential) -> Place:
        """This process's place, for a checkpoint."""
        modules, group = net.local_modules, self._group
        if self.stage is not None:
            modules = modules[self.stage.first : self.stage.last + 1]
        replica = 0 if group is None else torch.distributed.get_rank(group)
        replicas = 1 if group is None else torch.distributed.get_world_size(group)
        device = next((p.device for p in net.parameters() if not p.is_meta), torch.device("cpu"))
        return Place(modules, self.pipeline, self.cuts, replica, replicas, device)

    def meet(self, net: LocalSequential, optimizer: torch.optim.Optimizer, options: dict[str, Any]) -> None:
        """Compare what the processes were given; replicas take the first one's weights."""
        options = {**options, "sync_batch_norm": self.synced, "gather_features": self._gathers}
        if self.stage is not None:
            kind = f"{type(optimizer).__name__} {optimizer.defaults}"
            self._agree({"the optimizer": kind, "check_batches": self._check_batches, **options})
        if self._group is None:
            return
        facts = {**facts_of(net), "the optimizer": options_of(optimizer), **options}
        facts |= {"delay": self._delay, "stage_cuts": self.cuts}
        if self.shards is not None:
            agree(facts, self._group)
            self.replicas = self.shards
        else:
            held = [(name, p) for name, p in net.named_parameters() if not p.is_meta]
            buffers = [(name, b) for name, b in net.named_buffers() if not b.is_meta]
            self._agree_within_stage({**facts, "shard": False}, [*held, *buffers])
            self.replicas = Replicas(self._group, held, buffers, {**facts, "shard": False})
            self.replicas.take_first(tensor for _, tensor in (*held, *buffers))
        if self.synced:
            sync_batch_norm(net)
        if self._gathers:
            refuse_nothing_to_gather(net)
            self._hosts = group_like(self._group, on_hosts=True)

    @property
    def eager_reason(self) -> str | None:
        """Why steps are not captured as graphs; None where they may be."""
        if not self.alone:
            return "steps of several processes run eagerly"
        return "steps with a delay run eagerly" if self._delay else None

    def refuse_broken(self) -> None:
        """RuntimeError after a step that broke off here: stages, or processes, have seen different batches since."""
        if self.broken_by is None or (self.alone and not self._delay):
            return
        what = "some of its stages have trained on their batch and others have not"
        todo = "resume from a checkpoint"
        if not self.alone:
            what, todo = "the other processes have gone on or wait for it", f"end all of them, and {todo}"
        raise RuntimeError(f"a step of this process broke off with {self.broken_by}, and {what}: {todo}")

    def world(self) -> Any | None:
        """A process group of all processes of the mesh, on their hosts; None where there is one. Collective once."""
        if self._world is None and not self.alone:
            assert self._mesh is not None
            ranks = self._mesh.mesh.flatten().tolist()
            self._world = group_like(self._stages or self._group, ranks, on_hosts=True)
        return self._world

    def timed(self) -> AbstractContextManager[Any]:
        """Entered for a step and what is received and sent for it."""
        return nullcontext() if self.times is None else self.times.step()

    @contextmanager
    def region(self, samples: int, batch: int) -> Iterator[None]:
        """Entered for a stage's part of a step, on batch number ``batch`` with so many samples in this process."""
        if self.replicas is None:
            yield
            return
        stage = "" if self.stage is None else f", stage {self.stage.index}"
        self.replicas.where = where = f"rank {torch.distributed.get_rank()}{stage}, batch {batch}"
        with ExitStack() as entered:
            if self.synced:
                entered.enter_context(synced_statistics(self._group, where))
            if self._gathers:
                entered.enter_context(gathered_features(self._group, samples, self._hosts, where))
            yield

    def streams(self, modules: Sequence[LocalModule]) -> OneStream:
        """Where the modules run in a step that is not cut into stages."""
        return OneStream() if self.shards is None else _Whole(self.shards, modules[-1].index)

    @torch.no_grad()
    def predict(self, modules: Sequence[LocalModule], x: Tensor) -> Tensor | None:
        """Output of the network for x, in the last stage; None in the others."""
        if self.stage is None:
            relay = Relay(modules, x)
        else:
            relay = passing(modules, x, *self.stage.receive(x, inference=True))
        for module in modules:
            then = None if module is modules[-1] else module.index + 1
            with nullcontext() if self.shards is None else self.shards.whole(module.index, then, auxiliary=False):
                relay.through(module)
        if self.stage is None:
            return relay.h
        self.stage.send(relay.h, relay.history or (), inference=True)
        return relay.h if self.stage.index == self.stage.count - 1 else None


class _Whole(OneStream):
    """Has each module whole while it runs."""

    def __init__(self, shards: Shards, last: int) -> None:
        self._shards, self._last = shards, last

    def module(self, index: int) -> AbstractContextManager[Any]:
        super().module(index)
        return self._shards.whole(index, None if index == self._last else index + 1)

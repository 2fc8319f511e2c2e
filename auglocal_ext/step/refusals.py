"""Arguments of a step that are none, and what several processes, or stages with a delay, cannot honour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..auxiliary.base import Auxiliary, parts_of
from ..local_modules import LocalModule
from ..local_sequential import LocalSequential
from ..nn import eager_type, in_process_group
from .edges import Crossing
from .memory_plan import MemoryPlan


def check_network(net: Any) -> None:
    """TypeError for what is no network of local modules."""
    if isinstance(net, LocalSequential):
        return
    name, way = (eager_type(net) if isinstance(net, nn.Module) else type(net)).__name__, "wrap the network first"
    if isinstance(net, nn.parallel.DistributedDataParallel):
        way = "hand the step the network itself, and mesh= for its replicas: the step averages their gradients"
    elif isinstance(net, nn.DataParallel):
        way = "hand the step the network itself, .module; several GPUs are several processes, with mesh="
    raise TypeError(f"net must be a LocalSequential, got {name}; {way}")


def check_optimizer(optimizer: Any) -> None:
    """TypeError for what makes no optimizer."""
    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        raise TypeError(
            "optimizer must be a function that makes one of a list of parameters, such as lambda params: "
            f"torch.optim.SGD(params, lr=0.1); got {type(optimizer).__name__}"
        )


def refuse_unmeshed(meshed: bool) -> None:
    """RuntimeError among several processes without a mesh, whose weights would drift apart."""
    size = torch.distributed.get_world_size() if not meshed and in_process_group() else 1
    if size > 1:
        raise RuntimeError(
            f"this is one of {size} processes, and without mesh= LocalStep does not average gradients over them, "
            "so their weights would drift apart. Pass mesh=init_device_mesh(device, (size,), "
            'mesh_dim_names=("replica",)), or a mesh of size 1 for a network that only this process trains'
        )


def check_options(options: dict[str, Any], alone: bool, staged: bool) -> None:
    """ValueError for options that several processes cannot honour, or, where they are several, stages."""
    if not alone:
        refuse(options, "graph", "overlap", what="several processes")
        if options["plan"] is not None:
            raise ValueError(
                "memory is planned for one process, not for several: leave plan= out, and name the recomputation, "
                'such as recompute="all"'
            )
    if staged:
        refuse(options, "grad_scaler", what="several stages, each of which would find a scale of its own")
        if options["clip_norm"] is not None and options["clip"] == "global":
            raise ValueError(
                'clip="global" needs the gradients of all stages at once, and each steps by itself; take clip="module"'
            )


def check_delay(delay: int, several: bool, options: dict[str, Any]) -> None:
    """ValueError for a delay that cannot be honoured; ``several``: whether other processes hold the other stages."""
    if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
        raise ValueError(f"delay is a number of batches, at least 0; got {delay!r}")
    cuts, accumulate = options.pop("stage_cuts"), options.pop("accumulate")
    if not several and cuts is not None and not delay:
        raise ValueError(
            'stage_cuts is for several stages: pass a mesh with a dimension "stage", or delay= to replay a run over '
            "such stages, or leave it out"
        )
    if not delay:
        return
    if not several and cuts is None:
        raise ValueError(
            f'delay={delay} is between stages: pass a mesh with a dimension "stage", or, to replay such a run without '
            "one, its stage_cuts"
        )
    refuse(options, "graph", "overlap", what="stages with a delay")
    refuse(options, "grad_scaler", what="stages with a delay, each of which would find a scale of its own")
    if options["plan"] is not None:
        raise ValueError(
            "plans do not count the batches that delay= keeps: leave plan= out, and name the recomputation, such as "
            'recompute="all"'
        )
    if options["clip_norm"] is not None and options["clip"] == "global":
        raise ValueError('clip="global" clips gradients of one batch, and with delay= stages train on different ones')
    if isinstance(accumulate, int) and accumulate > 0 and delay % accumulate:
        raise ValueError(
            f"accumulate={accumulate} with delay={delay}: stages would be at different places of an accumulation. Take "
            "a delay that is a multiple of accumulate"
        )


def refuse_former(recompute: Any, memory_budget: Any, batch_size: Any) -> None:
    """ValueError for arguments of a plan, which a step takes ready-made."""
    if recompute == "peak" or memory_budget is not None:
        asked = 'recompute="peak"' if memory_budget is None else f"memory_budget={memory_budget!r}"
        size = "batch_size" if batch_size is None else batch_size
        raise ValueError(
            f"LocalStep takes a plan in place of {asked}: from auglocal_ext.planning import plan_memory, and pass "
            f"plan=plan_memory(net, {size}, optimizer, {asked}), with the params, autocast, clip_norm, clip and "
            "accumulate of the step"
        )
    if batch_size is not None:
        raise ValueError(
            f"LocalStep takes no batch_size: a plan has its own, plan=plan_memory(net, {batch_size}, optimizer), and "
            f'measured stages too, stage_cuts=Balanced(by="time", batch_size={batch_size})'
        )


def check_plan(plan: Any, recompute: Any, overlap: Any) -> None:
    """TypeError for what is no plan, and ValueError for options that contradict it."""
    if isinstance(plan, MemoryPlan):
        if recompute is not None:
            raise ValueError(f"the plan says what is recomputed: leave out recompute={recompute!r}, or plan=")
        if overlap not in ("auto", plan.overlap):
            raise ValueError(
                f"the plan has overlap={plan.overlap}, and the step overlap={overlap}: leave overlap out, or call "
                f"plan_memory(..., overlap={overlap})"
            )
    elif plan is not None:
        hint = "; a plan of stages is used by stage_cuts=plan.cuts" if hasattr(plan, "cuts") else ""
        raise TypeError(f"plan must be what plan_memory returned, got {type(plan).__name__}{hint}")


def refuse_autocast_around_a_plan(autocast: torch.dtype | None) -> None:
    """ValueError inside ``torch.autocast``, which neither a plan nor a planned step reads.

    Args:
        autocast: that of the plan; one given there holds inside too.
    """
    if autocast is None and any(map(torch.is_autocast_enabled, ("cpu", "cuda"))):
        raise ValueError(
            "a plan made with autocast=None is for steps outside of torch.autocast, and this is inside: leave the "
            "region, or pass autocast= to plan_memory and to LocalStep"
        )


def refuse_other_devices(net: LocalSequential, device: str | None) -> None:
    """ValueError for tensors that processes on ``device`` cannot send; None: of no mesh."""
    found = {t.device.type for t in (*net.parameters(), *net.buffers()) if not t.is_meta}
    if device is not None and found - {device}:
        raise ValueError(
            f'the network is on {" and ".join(sorted(found))}, and mesh is of {device}: call net.to("{device}") before '
            "the step is built, and train it on batches that are there"
        )


def refuse_shared_parameters(net: LocalSequential, modules: Sequence[LocalModule]) -> None:
    """ValueError for parameters of several local modules, which would have to be whole while either runs."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    owner: dict[int, int] = {}
    for module in modules:
        for parameter in module.parameters():
            first = owner.setdefault(id(parameter), module.index)
            if first != module.index:
                raise ValueError(
                    f"shard=True: local modules {first} and {module.index} share {names[id(parameter)]}, and a "
                    "parameter is whole only while its module runs: choose modules= that keep them together, or leave "
                    "shard out"
                )


def refuse_followed_shards(net: LocalSequential) -> None:
    """ValueError for shards of parameters that auxiliary networks read whole."""
    if any(isinstance(part, Auxiliary) and part.follows_whole for part in parts_of(net.auxiliary)):
        raise ValueError(
            f"shard=True: auxiliary networks of {net.rule!r} read other layers' parameters, and a parameter is whole "
            'only while its module runs: leave shard out, or let them have their own (of SOLO: readout="private")'
        )


def refuse(options: dict[str, Any], *names: str, what: str) -> None:
    """ValueError if one of these options is set."""
    for name in names:
        if options[name] not in (None, False, "auto"):
            raise ValueError(f"{name}={options[name]!r} cannot be honoured among {what}; leave it out")


def refuse_nothing_to_gather(net: LocalSequential) -> None:
    """ValueError for a network none of whose losses compares samples."""
    parts = parts_of(net.auxiliary)
    if not any(part.compares_samples or part.settings.task.compares_samples for part in parts):
        raise ValueError(
            f"gather_features=True is for losses that compare the samples of a batch, and {net.rule!r} has none: leave "
            "it out"
        )


def refuse_old_shards(crossings: Sequence[Crossing]) -> None:
    """ValueError for shards that another stage reads some steps later, which checkpoints would have to hold."""
    for crossing in crossings:
        if not crossing.followed[0].immediate:
            raise ValueError(
                f"shard=True: local module {crossing.module} reads parameters of stage {crossing.owner} as they were "
                "some steps ago, and of shards only the present ones are sent: leave shard out, or choose stage_cuts "
                "that keep them together"
            )

"""Options and networks that several processes, or stages with a delay, cannot honour."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..auxiliary.base import parts_of
from ..local_modules import LocalModule
from ..local_sequential import LocalSequential
from .edges import Crossing


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
    if options["recompute"] == "peak" or options["memory_budget"] is not None:
        raise ValueError(
            'recompute="peak" and memory_budget do not plan the batches that delay= keeps: name the recomputation, or '
            "leave them out"
        )
    if options["clip_norm"] is not None and options["clip"] == "global":
        raise ValueError('clip="global" clips gradients of one batch, and with delay= stages train on different ones')
    if isinstance(accumulate, int) and accumulate > 0 and delay % accumulate:
        raise ValueError(
            f"accumulate={accumulate} with delay={delay}: stages would be at different places of an accumulation. Take "
            "a delay that is a multiple of accumulate"
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

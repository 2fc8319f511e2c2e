"""Networks of which a process holds some local modules alone, and networks without values yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..local_modules import LocalModule
from ..nn import Deferred, give_memory, shard_like
from ..segments import Segment, runs_segment


class Held(nn.Module):
    """Local modules whose parameters and buffers may be on the meta device.

    Attributes:
        empty: whether parameters are allocated but have no values yet.
        sharded: whether parameters are spread over processes.
    """

    empty: bool
    sharded: bool
    primary: nn.Module
    task: nn.Module
    _held: tuple[int, int] | None
    _deferred: Deferred | None

    @property
    def local_modules(self) -> tuple[LocalModule, ...]:
        raise NotImplementedError

    @property
    def held(self) -> tuple[int, int] | None:
        """First and last local module that this process holds, see :meth:`hold`; None if it holds all."""
        return self._held

    def hold(self, first: int, last: int) -> None:
        """Keep local modules ``first`` .. ``last``; the parameters and buffers of all others go to the meta device.

        Parameter names stay. The network cannot run as a whole afterwards: :class:`auglocal_ext.LocalStep` does, among
        the processes that hold the other modules.
        """
        for module in self.local_modules:
            if not first <= module.index <= last:
                for part in module.parts():
                    part.to("meta")
        self._drop_shared(_tensors(part for module in self.local_modules[first : last + 1] for part in module.parts()))
        self._held = first, last
        self.spread(f"local modules {first} to {last} of the network")

    @torch.no_grad()
    def _drop_shared(self, held: Iterable[Tensor]) -> None:
        """Move what segments share, and so have not moved, to the meta device, but for the tensors ``held``."""
        kept = set(map(id, held))
        made: dict[int, Tensor] = {}
        for owner in self.primary.modules():
            for key, tensor in (*owner._parameters.items(), *owner._buffers.items()):
                if tensor is None or tensor.is_meta or id(tensor) in kept:
                    continue
                moved = tensor.to("meta")
                if isinstance(tensor, nn.Parameter):
                    moved = nn.Parameter(moved, tensor.requires_grad)
                setattr(owner, key, made.setdefault(id(tensor), moved))

    def spread(self, held: str) -> None:
        """Note that this process holds a part of the parameters; the model itself, when it is called, says so.

        Args:
            held: the part, in words.
        """
        for module in self.local_modules:
            for part in (module.segment, *module.layers):
                if isinstance(part, Segment):
                    part.spread = True
        self.primary.register_forward_pre_hook(partial(_refuse_call, held))

    def materialise(self, device: torch.device | str, each: Callable[[LocalModule], None] | None = None) -> None:
        """Allocate parameters and buffers that are on the meta device; after :meth:`hold`, those of the held modules.

        A network built inside :func:`auglocal_ext.nn.deferred` gets its initial values. Any other is ``empty``: it
        raises until a state dict or a checkpoint is loaded. Parameters stay the same objects.

        Args:
            device: where to. Without ``each`` tensors that are on another one stay there.
            each: called with a local module once its tensors are there, before the next one's get memory.

        Raises:
            RuntimeError: if a tensor was created outside ``deferred``, or if a buffer could not be loaded because it is
                in no state dict.
        """
        first, last = self._held or (0, len(self.local_modules) - 1)
        modules = self.local_modules[first : last + 1]
        parts: list[list[nn.Module]] = [[self.task], *(list(module.parts()) for module in modules)]
        names = {id(tensor): name for name, tensor in (*self.named_parameters(), *self.named_buffers())}
        on_meta = [names[id(tensor)] for some in parts for tensor in _tensors(some) if tensor.is_meta]
        if not on_meta and each is None:
            return
        if on_meta and self._deferred is None:
            loaded = self.state_dict().keys()
            for name in on_meta:
                if name not in loaded:
                    raise RuntimeError(
                        f"{name} is on the meta device and in no state dict, so it could not be loaded: build the "
                        "network inside auglocal_ext.nn.deferred"
                    )
        where = torch.empty(0, device=device).device
        for module, some in zip((None, *modules), parts, strict=True):
            give_memory([(names[id(tensor)], tensor) for tensor in _tensors(some)], where, self._deferred)
            if each is not None and module is not None:
                each(module)
        if on_meta:
            self.empty, self._deferred = self._deferred is None, None

    @property
    def deferred(self) -> Deferred | None:
        """What gives the network its initial values, until :meth:`materialise` has; None if nothing is deferred."""
        return self._deferred

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        if self.sharded:
            held = self.state_dict()
            state_dict = {name: shard_like(value, held.get(name)) for name, value in state_dict.items()}
        keys = super().load_state_dict(state_dict, strict, assign)
        self.empty = self.empty and bool(keys.missing_keys)
        return keys

    def refuse_empty(self) -> None:
        """RuntimeError if the network is :attr:`empty`."""
        if self.empty:
            raise RuntimeError(
                "the network was built on the meta device and has no values yet: load a checkpoint, or build it inside "
                "auglocal_ext.nn.deferred"
            )


def _refuse_call(held: str, model: nn.Module, args: Any) -> None:
    if not runs_segment(model):
        raise RuntimeError(
            f"this process holds {held}, so {type(model).__name__} cannot run by itself: infer by step.predict(x), in "
            "all processes, or save by step.save(folder) and load that in one process"
        )


def _tensors(parts: Iterable[nn.Module]) -> Iterator[Tensor]:
    """Parameters and buffers, each once."""
    seen: set[int] = set()
    for part in parts:
        for tensor in (*part.parameters(), *part.buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor

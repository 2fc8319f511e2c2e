"""Networks built without memory: how each tensor is initialised is recorded, and done later where it is needed."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .._torch import TorchDispatchMode, skipped_init, storage_id, tree_flatten, tree_unflatten, written_tensors


@dataclass(frozen=True)
class _View:
    """A tensor as a view of its storage."""

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @staticmethod
    def of(tensor: Tensor) -> _View:
        return _View(_storage(tensor), tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        empty = torch.empty(0, dtype=self.dtype, device=storage.device)
        return empty.set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True)
class _Write:
    """A recorded call that writes to storages.

    Attributes:
        draw: the number of calls before this one that draw random numbers; None if this one draws none.
        reads: storages it reads or changes.
        makes: storages of its outputs, in order, None where an output lies in one of ``reads``.
    """

    func: Any
    args: tuple[Any, ...]
    spec: Any
    draw: int | None
    reads: tuple[int, ...]
    makes: tuple[int | None, ...]


class Deferred(TorchDispatchMode):
    """Records the calls that write to meta tensors; :meth:`value` runs those that one tensor depends on.

    Each call that draws random numbers gets its own seed, from ``seed`` and the number of such calls before it. So the
    values of a tensor do not depend on which others are computed.
    """

    active: Deferred | None = None

    def __init__(self, seed: int) -> None:
        super().__init__()
        digest = hashlib.sha256(str(seed).encode()).digest()
        self._seed = int.from_bytes(digest[:4], "little")
        self._draws = 0
        self._writes: list[_Write] = []
        self._writers: dict[int, list[int]] = {}
        self._alive: list[torch.UntypedStorage] = []  # so that no other gets the same address

    @property
    def origin(self) -> tuple[int, int]:
        """What all values depend on: equal for two that were given the same seed and the same number of draws."""
        return self._seed, self._draws

    def __deepcopy__(self, memo: dict[int, Any]) -> Deferred:
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        self.note(func, args, kwargs, written_tensors(func, args, kwargs), tree_flatten(out)[0], drawn)
        return out

    def note(
        self, func: Any, args: Any, kwargs: dict[str, Any], changed: Iterable[Any], outputs: Sequence[Any], drawn: bool
    ) -> None:
        """Record a call, with the tensors it changes and returns, if it writes to the meta device."""
        flat, spec = tree_flatten((args, kwargs))
        reads = {_storage(each) for each in flat if _is_meta(each)}
        written = {_storage(each) for each in changed if _is_meta(each)}
        returned = [_storage(each) if _is_meta(each) else None for each in outputs if isinstance(each, Tensor)]
        made = tuple(None if key in reads else key for key in returned)
        written.update(key for key in made if key is not None)
        if written:
            if any(isinstance(each, torch.Generator) for each in flat):
                raise RuntimeError("deferred() seeds every random call itself: leave generator= out")
            self._alive.extend(each.untyped_storage() for each in outputs if _is_meta(each))
            for key in written:
                self._writers.setdefault(key, []).append(len(self._writes))
            draw = self._draws if drawn else None
            self._writes.append(_Write(func, tuple(map(_stored, flat)), spec, draw, tuple(reads), made))
        self._draws += drawn

    def knows(self, tensor: Tensor) -> bool:
        """Whether the tensor was created while this was active."""
        return _storage(tensor) in self._writers

    @torch.no_grad()
    def value(self, tensor: Tensor) -> Tensor:
        """The values of a tensor that this :meth:`knows`, on the CPU."""
        wanted = _View.of(tensor)
        storages: dict[int, torch.UntypedStorage] = {}
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            for index in self._needed(wanted.storage):
                self._repeat(self._writes[index], storages)
        return wanted.on(storages[wanted.storage])

    def _needed(self, storage: int) -> list[int]:
        """Calls that wrote to a storage, and those that wrote what these read, in order."""
        needed: set[int] = set()
        asked = [(storage, len(self._writes))]
        until: dict[int, int] = {}
        while asked:
            key, end = asked.pop()
            if until.get(key, 0) >= end:
                continue
            until[key] = end
            for index in self._writers.get(key, ()):
                if index < end and index not in needed:
                    needed.add(index)
                    asked.extend((read, index) for read in self._writes[index].reads)
        return sorted(needed)

    def _repeat(self, write: _Write, storages: dict[int, torch.UntypedStorage]) -> None:
        flat = [each.on(storages[each.storage]) if isinstance(each, _View) else each for each in write.args]
        args, kwargs = tree_unflatten(flat, write.spec)
        if write.draw is not None:
            torch.manual_seed((self._seed + write.draw * 0x9E3779B1) % 2**32)  # odd factor: no two are alike
        outputs = [each for each in tree_flatten(write.func(*args, **kwargs))[0] if isinstance(each, Tensor)]
        if not write.makes:  # a function of nn.init returns what it was given
            return
        for key, output in zip(write.makes, outputs, strict=True):
            if key is not None:
                storages[key] = output.untyped_storage()


class _Skipped(TorchFunctionMode):
    """Records what torch skips on the meta device: the values of ``torch.tensor`` and some functions of ``nn.init``."""

    def __init__(self, recorder: Deferred) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "meta").type == "meta":
            return func(*args, **{**kwargs, "device": "cpu"}).to("meta")
        out = func(*args, **kwargs)
        if (skipped := skipped_init(func, out)) is not None:
            function = getattr(nn.init, skipped.f_code.co_name)
            given = {name: skipped.f_locals[name] for name in inspect.signature(function).parameters}
            self._recorder.note(function, (), given, args, (), drawn=True)
        return out


@contextmanager
def deferred(seed: int) -> Iterator[None]:
    """Build networks on the meta device, and record how their constructors initialise them.

    ::

        with deferred(seed=0):
            net = LocalSequential(models.resnet110(), AugLocal(depth=2), num_classes=10, input_shape=(3, 32, 32))
        step = LocalStep(net, optimizer, mesh=mesh)  # initialises this stage alone

    ``LocalStep(mesh=...)`` and :meth:`auglocal_ext.LocalSequential.materialise` run the recorded initialisation for the
    tensors they need. The values depend on the constructors and on ``seed`` alone, not on how the network is split over
    processes, nor on the device. They differ from those after ``torch.manual_seed(seed)``; the global random state is
    neither read nor changed.

    Args:
        seed: any integer, the same in all processes. Constructors must make the same calls in all of them.

    Raises:
        RuntimeError: if it is nested, or if a constructor passes a ``torch.Generator``. A constructor that reads a
            value back raises torch's own error.
    """
    if Deferred.active is not None:
        raise RuntimeError("deferred() cannot be nested")
    recorder = Deferred(seed)
    Deferred.active = recorder
    try:
        with torch.device("meta"), _Skipped(recorder), recorder:
            yield
    finally:
        Deferred.active = None


def _storage(tensor: Tensor) -> int:
    return storage_id(tensor.untyped_storage())


def _is_meta(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


def _stored(value: Any) -> Any:
    if isinstance(value, Tensor):
        return _View.of(value) if _is_meta(value) else value.detach().clone()
    return torch.device("cpu") if isinstance(value, torch.device) else value


@torch.no_grad()
def give_memory(named: Sequence[tuple[str, Tensor]], device: torch.device, recorder: Deferred | None) -> None:
    """Allocate tensors that are on the meta device, and initialise them if there is a ``recorder``; move others.

    They stay the same objects, so optimizers, parameter groups and shared parameters remain valid.

    Raises:
        RuntimeError: if ``recorder`` does not know one of them.
    """
    for name, tensor in named:
        if tensor.is_meta and recorder is not None and not recorder.knows(tensor):
            raise RuntimeError(
                f"{name} was not created inside deferred(): build the whole network there, and convert it there too"
            )
    for _, tensor in named:
        if tensor.device == device:
            continue
        made = torch.empty_like(tensor, device=device, requires_grad=False)
        if not tensor.is_meta:
            made.copy_(tensor)
        elif recorder is not None:
            made.copy_(recorder.value(tensor))
        if isinstance(tensor, nn.Parameter):
            made = nn.Parameter(made, tensor.requires_grad)
        torch.utils.swap_tensors(tensor, made)

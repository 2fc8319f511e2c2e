"""Live bytes of tensor storage, counted operator by operator, on any device and without one.

The meter is a dispatch mode that holds storages by weak reference and counts each once, rounded up to the allocator's
512 bytes. When a storage dies, its bytes are subtracted. Under fake tensors this predicts a step's peak without a GPU
and without the memory.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from auglocal_ext._torch import TorchDispatchMode, storage_id

ROUNDING = 512  # bytes; the CUDA caching allocator hands out multiples of this

PARAMETERS = "parameters"
BUFFERS = "buffers"
GRADIENTS = "gradients"
OPTIMIZER_STATE = "optimizer state"
INPUTS = "inputs"
ACTIVATIONS = "activations and other"
#: Categories of live bytes, as in :attr:`MemoryMeter.live_categories`.
CATEGORIES = (PARAMETERS, BUFFERS, GRADIENTS, OPTIMIZER_STATE, INPUTS, ACTIVATIONS)

_DEVICE_QUERY = torch.ops.prim.device.default


def rounded(nbytes: int) -> int:
    """``nbytes`` rounded up to the allocator's granularity of 512 bytes; 0 stays 0."""
    return -(-nbytes // ROUNDING) * ROUNDING


@dataclass(frozen=True)
class Mark:
    """A name for a point in time: ``event`` operators had run when it was set."""

    event: int
    label: str


@dataclass(frozen=True)
class LiveStorage:
    """One storage that is alive: rounded bytes, category, and the operator and event that made it."""

    nbytes: int
    category: str
    operator: str
    event: int


class _Entry(weakref.ref[torch.UntypedStorage]):
    """Weak reference to one storage, with what has to be known when the storage dies."""

    __slots__ = ("key", "nbytes", "category", "event", "operator")
    key: int
    nbytes: int
    category: str
    event: int
    operator: Any


class MemoryMeter(TorchDispatchMode):
    """Count the bytes of all tensor storages that are alive while the mode is active.

    Every storage counts once, however many views share it, from the operator that made it until the last
    tensor over it dies; sizes are rounded up to 512 bytes, as the CUDA caching allocator does. Memory that an
    operator allocates and frees inside itself (a library's workspace) is not seen. Works on real tensors and
    under ``FakeTensorMode`` (enter the meter inside it), where neither a GPU nor the memory is needed.

    Tensors that exist before the mode is entered are unknown to it until an operator returns them or
    :meth:`track` is told about them. A storage resized outside an operator is read again at the next mark.
    Tensors without a storage (sparse ones) are not counted.

    Attributes:
        live_bytes: now.
        peak_bytes: largest so far.
        peak_event: where the peak was reached.
        events: operators seen.
        timeline: ``(event, live bytes)`` at every change.
        marks: named points, see :meth:`mark`.

    ::

        with MemoryMeter() as meter:
            meter.track(net, optimizer, x)
            loss = net(x).sum()
            meter.mark("backward")
            loss.backward()
        print(meter.peak_bytes, meter.peak_categories)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.peak_event = 0
        self.events = 0
        self.timeline: list[tuple[int, int]] = []
        self.marks: list[Mark] = []
        self._entries: dict[int, _Entry] = {}
        self._by_category = dict.fromkeys(CATEGORIES, 0)
        self._at_peak = dict(self._by_category)
        self._tracked: list[weakref.ref] = []

    def __enter__(self) -> MemoryMeter:
        super().__enter__()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)
        self.refresh()

    @property
    def live_categories(self) -> dict[str, int]:
        """Live bytes by category, now."""
        return dict(self._by_category)

    @property
    def peak_categories(self) -> dict[str, int]:
        """Live bytes by category at the peak.

        A gradient or an optimizer's state is known as such from the first :meth:`mark`, :meth:`refresh` or
        exit that finds it in ``.grad`` or ``optimizer.state``; the peak's share is then corrected.
        """
        return dict(self._at_peak)

    def track(self, *objects: Any, category: str | None = None) -> None:
        """Count tensors that the meter has not seen being made.

        Modules (parameters, buffers, gradients), optimizers (state), tensors, and tuples, lists and dicts of
        these. ``category`` names the tensors given directly; default ``"inputs"``. Modules and optimizers are
        remembered, weakly, so that gradients and state which appear later are put into their category.

        Raises:
            TypeError: for any other object.
            ValueError: for an unknown category.
        """
        if category is not None and category not in CATEGORIES:
            raise ValueError(f"expected one of the categories {CATEGORIES}, got {category!r}")
        for item in objects:
            if isinstance(item, Tensor):
                self._observe(item, "track", category or INPUTS)
            elif isinstance(item, (nn.Module, torch.optim.Optimizer)):
                self._tracked.append(weakref.ref(item))
                self._classify(item)
            elif isinstance(item, Mapping):
                self.track(*item.values(), category=category)
            elif isinstance(item, Iterable) and not isinstance(item, (str, bytes)):
                self.track(*item, category=category)
            else:
                raise TypeError(
                    f"expected modules, optimizers, tensors or collections of them, got {type(item).__name__}"
                )
        self._record()

    def mark(self, label: str) -> None:
        """Name this point of the timeline, for example ``meter.mark("module 3 forward")``."""
        self.refresh()
        self.marks.append(Mark(self.events, label))

    def refresh(self) -> None:
        """Read again what no operator reports: new gradients, new optimizer state, resized storages."""
        for reference in self._tracked:
            item = reference()
            if item is not None:
                self._classify(item)
        for entry in list(self._entries.values()):
            storage = entry()
            if storage is not None:
                self._resize(entry, rounded(storage.nbytes()))
        self._record()

    def live(self) -> list[LiveStorage]:
        """Every storage alive now, the largest first: what still holds memory, and which operator made it."""
        alive = [LiveStorage(e.nbytes, e.category, str(e.operator), e.event) for e in self._entries.values()]
        return sorted(alive, key=lambda storage: -storage.nbytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE_QUERY:  # fake tensors ask for their device many times per operator
            return func(*args)
        if self.timeline and self.timeline[-1][1] != self.live_bytes:
            self.timeline.append((self.events, self.live_bytes))  # what died since the last operator
        out = func(*args, **(kwargs or {}))
        self.events += 1
        if isinstance(out, Tensor):
            self._observe(out, func)
        elif isinstance(out, (tuple, list)):
            for item in out:
                if isinstance(item, Tensor):
                    self._observe(item, func)
        self._record()
        return out

    def _classify(self, item: nn.Module | torch.optim.Optimizer) -> None:
        if isinstance(item, nn.Module):
            for parameter in item.parameters():
                self._observe(parameter, "track", PARAMETERS)
                if parameter.grad is not None:
                    self._observe(parameter.grad, "track", GRADIENTS)
            for buffer in item.buffers():
                self._observe(buffer, "track", BUFFERS)
        else:
            for state in item.state.values():
                for value in state.values():
                    if isinstance(value, Tensor):
                        self._observe(value, "track", OPTIMIZER_STATE)

    def _observe(self, tensor: Tensor, operator: Any, category: str | None = None) -> None:
        """Enter the tensor's storage, or bring its size and category up to date."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return
        nbytes = rounded(storage.nbytes())
        key = storage_id(storage)
        entry = self._entries.get(key)
        if entry is None:
            entry = _Entry(storage, self._forget)
            entry.key = key
            entry.nbytes = 0
            entry.category = category or ACTIVATIONS
            entry.operator = operator
            entry.event = self.events
            self._entries[key] = entry
        elif category is not None and category != entry.category:
            self._move(entry, category)
        if nbytes != entry.nbytes:
            self._resize(entry, nbytes)

    def _forget(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        self._resize(entry, 0)

    def _resize(self, entry: _Entry, nbytes: int) -> None:
        change = nbytes - entry.nbytes
        entry.nbytes = nbytes
        self.live_bytes += change
        self._by_category[entry.category] += change

    def _move(self, entry: _Entry, category: str) -> None:
        self._by_category[entry.category] -= entry.nbytes
        self._by_category[category] += entry.nbytes
        if entry.event <= self.peak_event:  # alive now and born before the peak: it was alive at the peak
            self._at_peak[entry.category] -= entry.nbytes
            self._at_peak[category] += entry.nbytes
        entry.category = category

    def _record(self) -> None:
        live = self.live_bytes
        if live > self.peak_bytes:
            self.peak_bytes = live
            self.peak_event = self.events
            self._at_peak = self._by_category.copy()
        if not self.timeline or self.timeline[-1][1] != live:
            self.timeline.append((self.events, live))

"""Values are checked before any work: at once on the CPU, without a synchronisation and therefore later on CUDA."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .._torch import FakeTensor


@dataclass
class _Deferred:
    """A count of bad values on its way from the device to ``host`` (pinned, one int64), and the error it may become."""

    event: torch.cuda.Event
    host: Tensor
    message: Callable[[int], str]


_pending: deque[_Deferred] = deque()
_spare: list[Tensor] = []  # pinned words that came back; pinning a new one synchronises the device
_lock = threading.Lock()


def check_values(
    values: Tensor,
    bad: Callable[[], Tensor],
    at_once: Callable[[Tensor], str],
    late: Callable[[int], str],
    good: Callable[[], bool] | None = None,
) -> None:
    """Raise ValueError if any of ``values`` is bad.

    On the CPU at once. On CUDA the count of bad values is copied to the host without waiting for it, and the first
    later call of this function or of :func:`raise_deferred_errors` that finds the copy finished raises. Values are not
    checked under ``torch.compile``, fake tensors or stream capture.

    Args:
        bad: makes the mask of bad values, on the device of ``values``.
        at_once: the message for that mask.
        late: the message for a count of them.
        good: a cheaper question, asked where the host can see the values: True if none is bad, False if it cannot tell.
    """
    if torch.compiler.is_compiling() or isinstance(values, FakeTensor) or values.device.type == "meta":
        return
    if values.is_cuda:
        if not torch.cuda.is_current_stream_capturing():
            raise_deferred_errors()
            _defer(values.device, bad, late)
        return
    if good is not None and good():
        return
    mask = bad()
    if bool(mask.any()):
        raise ValueError(at_once(mask))


def raise_deferred_errors(wait: bool = False) -> None:
    """Raise ValueError if values of an earlier CUDA batch were bad; ``wait`` for counts under way."""
    while True:
        with _lock:
            if not _pending or not (wait or _pending[0].event.query()):
                return
            entry = _pending.popleft()
        if wait:
            entry.event.synchronize()
        count = int(entry.host)
        with _lock:
            _spare.append(entry.host)
        if count:
            raise ValueError(entry.message(count))


class BadValueCounter:
    """Counts bad values where the host cannot be asked: in a captured CUDA graph, over all its replays.

    ``add(mask)`` runs on the device and sends the running total to the host without waiting for it;
    ``raise_if_any(late)`` reads what has arrived. Both may be far apart, so the error comes some batches late.
    """

    def __init__(self, device: torch.device) -> None:
        self._total = torch.zeros((), dtype=torch.int64, device=device)
        self._host = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._reported = 0

    def add(self, mask: Tensor) -> None:
        """Count the bad values of a batch."""
        self._total += mask.sum()
        self._host.copy_(self._total, non_blocking=True)

    def raise_if_any(self, late: Callable[[int], str]) -> None:
        """ValueError, with ``late(count)``, if bad values were counted of which no earlier call has raised."""
        count = int(self._host) - self._reported
        if count:
            self._reported += count
            raise ValueError(late(count))


def _defer(device: torch.device, bad: Callable[[], Tensor], late: Callable[[int], str]) -> None:
    with torch.cuda.device(device), torch.no_grad():
        count = bad().sum()
        with _lock:
            host = _spare.pop() if _spare else None
        if host is None:
            host = torch.empty((), dtype=torch.int64, pin_memory=True)
        host.copy_(count, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    with _lock:
        _pending.append(_Deferred(event, host, late))

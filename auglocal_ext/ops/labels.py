"""Labels are checked before any work: at once on the CPU, without a synchronisation and therefore later on CUDA."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


@dataclass
class _Deferred:
    """A count of bad labels on its way from the device to ``host`` (pinned, one int64)."""

    event: torch.cuda.Event
    host: Tensor
    labels: int
    num_classes: int
    ignore_index: int


_pending: deque[_Deferred] = deque()
_spare: list[Tensor] = []  # pinned words that came back; pinning a new one synchronises the device
_lock = threading.Lock()


def check_labels(target: Tensor, num_classes: int, ignore_index: int = -100) -> None:
    """Raise unless every label is in [0, num_classes) or equals ``ignore_index``.

    target (N,) int64. A wrong dtype raises TypeError and a wrong shape ValueError, at once and everywhere. Values are
    checked at once on the CPU: ValueError names the first bad label and its index. On CUDA their count is copied to the
    host without waiting for it, and the first later call of :func:`check_labels` or :func:`raise_deferred_errors` that
    finds the copy finished raises. Values are not looked at under ``torch.compile``, fake tensors or stream capture.
    """
    check_form(target)
    if torch.compiler.is_compiling() or isinstance(target, FakeTensor) or target.device.type == "meta":
        return
    if target.is_cuda:
        if not torch.cuda.is_current_stream_capturing():
            raise_deferred_errors()
            _defer(target, num_classes, ignore_index)
        return
    bad = _bad(target, num_classes, ignore_index)
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ValueError(
            f"label {int(target[index])} at index {index} is out of range: expected "
            f"{_expected(num_classes, ignore_index)}; {int(bad.sum())} of {target.numel()} labels are wrong. "
            "Check num_classes and the data set's numbering"
        )


def ignoring_bad_labels(target: Tensor, num_classes: int, ignore_index: int = -100) -> Tensor:
    """``target`` with ``ignore_index`` in place of labels out of range, which torch's losses stop a CUDA device for."""
    return target.masked_fill(_bad(target, num_classes, ignore_index), ignore_index)


class BadLabelCounter:
    """Counts labels out of range where the host cannot be asked: in a captured CUDA graph, over all its replays.

    ``add(target)`` runs on the device and sends the running total to the host without waiting for it;
    ``raise_if_any()`` reads what has arrived. Both may be far apart, so the error comes some batches late.
    """

    def __init__(self, device: torch.device, num_classes: int, ignore_index: int = -100) -> None:
        self._num_classes, self._ignore_index = num_classes, ignore_index
        self._total = torch.zeros((), dtype=torch.int64, device=device)
        self._host = torch.zeros((), dtype=torch.int64, pin_memory=device.type == "cuda")
        self._reported = 0

    def add(self, target: Tensor) -> None:
        """Count the bad labels of ``target`` ``(N,)``, int64."""
        self._total += _bad(target, self._num_classes, self._ignore_index).sum()
        self._host.copy_(self._total, non_blocking=True)

    def raise_if_any(self) -> None:
        """ValueError if bad labels were counted that no earlier call has told of."""
        count = int(self._host) - self._reported
        if count:
            self._reported += count
            raise ValueError(_late(f"{count} labels of earlier batches", self._num_classes, self._ignore_index))


def check_form(target: Tensor) -> None:
    """Raise unless ``target`` is a vector of int64."""
    if target.dtype != torch.int64:
        raise TypeError(f"expected labels of dtype torch.int64, got {target.dtype}; convert them with target.long()")
    if target.dim() != 1:
        raise ValueError(
            f"expected labels of shape (N,), got {tuple(target.shape)}; pass one class number per image "
            "(class probabilities are not supported)"
        )


def raise_deferred_errors(wait: bool = False) -> None:
    """Raise ValueError if labels of an earlier CUDA batch were out of range; ``wait`` for counts under way."""
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
            which = f"{count} of {entry.labels} labels of an earlier batch"
            raise ValueError(_late(which, entry.num_classes, entry.ignore_index))


def _bad(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    return ((target < 0) | (target >= num_classes)) & (target != ignore_index)


def _defer(target: Tensor, num_classes: int, ignore_index: int) -> None:
    with torch.cuda.device(target.device), torch.no_grad():
        count = _bad(target, num_classes, ignore_index).sum()
        with _lock:
            host = _spare.pop() if _spare else None
        if host is None:
            host = torch.empty((), dtype=torch.int64, pin_memory=True)
        host.copy_(count, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    with _lock:
        _pending.append(_Deferred(event, host, target.numel(), num_classes, ignore_index))


def _late(which: str, num_classes: int, ignore_index: int) -> str:
    return (
        f"{which} were out of range: expected {_expected(num_classes, ignore_index)}. They were treated as ignored. "
        "Check num_classes and the data set's numbering; checking one batch on the CPU names the label"
    )


def _expected(num_classes: int, ignore_index: int) -> str:
    return f"0 <= label < {num_classes} or the ignored label {ignore_index}"

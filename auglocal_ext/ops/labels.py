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
            raise ValueError(
                f"{count} of {entry.labels} labels of an earlier batch were out of range: expected "
                f"{_expected(entry.num_classes, entry.ignore_index)}. They were treated as ignored. Check num_classes "
                "and the data set's numbering; checking one batch on the CPU names the label"
            )


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


def _expected(num_classes: int, ignore_index: int) -> str:
    return f"0 <= label < {num_classes} or the ignored label {ignore_index}"

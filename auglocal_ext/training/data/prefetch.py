"""Batches made ready while the step before them runs, and the time that steps wait for their batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, cuda

Batch = tuple[Tensor, Tensor]


class Feed(Protocol):
    """Hands the batches of a source to the steps of a training loop.

    ``for images, labels in feed(source): step(images, labels)``. The source is asked for a batch only after the step
    before it was launched, so its state is always that of the steps done: a checkpoint needs to know of no
    batch that was drawn and not yet trained on. A batch belongs to its step: it may be used until the
    next one is asked for.
    """

    def __call__(self, source: Iterator[Batch]) -> Iterator[Batch]: ...

    def waited(self) -> float:
        """Seconds that steps waited for their batch since the last call; on CUDA after a synchronisation only."""


def make_feed(device: torch.device) -> Feed:
    """A feed for steps on ``device``: on CUDA batches are made on a stream of their own."""
    return StreamFeed(device) if device.type == "cuda" else InlineFeed()


class InlineFeed:
    """Each batch is made when it is asked for; the wait is the time that takes."""

    def __init__(self) -> None:
        self._waited = 0.0

    def __call__(self, source: Iterator[Batch]) -> Iterator[Batch]:
        while True:
            start = time.perf_counter()
            batch = next(source, None)
            self._waited += time.perf_counter() - start
            if batch is None:
                return
            yield batch

    def waited(self) -> float:
        waited, self._waited = self._waited, 0.0
        return waited


class StreamFeed:
    """Batch k + 1 is made on a stream of its own while step k runs on the caller's; no host synchronisation.

    The wait for it is read from events: from the end of step k to the moment when both streams have met and step
    k + 1 may start. It counts whatever was late: the device's work, or a host that was waiting for a loader.

    Memory is passed between the streams by ownership, not by ``record_stream``, whose blocks are free only when the
    host sees that a step has ended: a host that runs ahead would allocate anew for every batch. Here the
    making of batch k + 1 begins, on the device, after the end of step k - 1. So the memory of batch k - 1 can be
    its own, two batches exist at a time, and how far the host is ahead does not matter.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = cuda.Stream(device)
        self._waits: list[tuple[cuda.Event, cuda.Event]] = []

    def __call__(self, source: Iterator[Batch]) -> Iterator[Batch]:
        making = self._stream
        released: cuda.Event | None = None
        while True:
            steps = cuda.current_stream(self._device)  # asked for each time: steps may have moved to another
            ended, started = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
            ended.record(steps)
            # The first batch waits for everything before it: its source was made on the step's stream.
            making.wait_event(released or ended)
            with cuda.stream(making):
                batch = next(source, None)
            steps.wait_stream(making)
            if batch is None:
                return
            started.record(steps)
            self._waits.append((ended, started))
            released = ended
            yield batch

    def waited(self) -> float:
        waits, self._waits = self._waits, []
        return sum(ended.elapsed_time(started) for ended, started in waits) / 1000

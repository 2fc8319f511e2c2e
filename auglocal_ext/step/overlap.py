"""Backward of one local module beside the forward of the next, on two CUDA streams.

Modules alternate between the streams. Module k + 1 starts when the event of module k's output is reached, while the
head, backward and optimizer of module k still run. The caching allocator of one stream knows nothing about the other,
so a module's input is kept until both streams have passed its readers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..local_modules import OneStream


class TwoStreams(OneStream):
    """Even local modules run on the current stream, odd ones on a second: forward, loss, backward and step.

    Module k + 1 starts once module k's output exists, while module k's auxiliary network, backward and optimizer still
    run. Module k + 2 comes after module k on the same stream, so at most two modules' activations are alive.

    The allocator gives a freed block to the next tensor of the stream it was made on, and knows of no other stream that
    still reads it. So module inputs, which alone cross over, are kept here until both streams have passed their last
    reader: module r has ended for every stream when module r + 3 starts, since that one waits for r + 2, which waits
    for r's stream. ``record_stream`` would do so too, but not within a graph capture.

    Args:
        device: a CUDA device.
        second: the stream of the odd modules.
    """

    def __init__(self, device: torch.device, second: torch.cuda.Stream) -> None:
        self._device = device
        self._second = second
        self._first: torch.cuda.Stream | None = None
        self._handed_on: torch.cuda.Event | None = None
        self._read_by: deque[tuple[int, list[Tensor]]] = deque()

    @contextmanager
    def module(self, index: int) -> Iterator[None]:
        self.current = index
        if index == 0:
            self._first = torch.cuda.current_stream(self._device)
            self._second.wait_stream(self._first)
        assert self._first is not None
        stream = self._second if index % 2 else self._first
        if self._handed_on is not None:
            stream.wait_event(self._handed_on)
        while self._read_by and self._read_by[0][0] <= index - 3:
            self._read_by.popleft()
        with torch.cuda.stream(stream):
            yield

    def handed_on(self, index: int, h: Tensor, history: Sequence[Tensor | None]) -> None:
        self._handed_on = torch.cuda.current_stream(self._device).record_event()
        self._read_by.append((index + 1, [h, *(t for t in history if t is not None)]))

    def join(self) -> None:
        if self._first is not None:  # else no module has begun
            self._first.wait_stream(self._second)
        self._first = self._handed_on = None
        self._read_by.clear()

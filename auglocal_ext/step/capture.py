"""Recording a CUDA graph: its stream, what is forbidden meanwhile, and the recovery from a capture that failed.

``torch.cuda.graph`` restores nothing when CUDA has invalidated the capture. Stream, allocator and, in torch 2.11, the
generator are restored by hand, so that a failed capture leaves no trace. Garbage is not collected during a capture,
because destroying an old graph would invalidate it.

Warm-up and capture share a stream, one per step and device. cuBLAS's workspaces are cleared before and after, so that
those of the graph lie in its own pool: torch frees the workspaces of a stream when any of its graphs is destroyed,
while other graphs still write to them.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from .._torch import clear_cublas_workspaces, give_back_pool

WAITS = "called a synchronizing CUDA operation"
"""What torch warns of where the host waits for the device."""

_WARN = 1  # of torch.cuda.get_sync_debug_mode

_broken: list[torch.cuda.CUDAGraph] = []
"""Graphs whose capture CUDA broke off: torch 2.11 keeps their address, as in its allocator of pinned memory."""


def can_capture(device: torch.device) -> bool:
    """Whether steps on ``device`` can be captured at all."""
    return device.type == "cuda"


def make_stream(device: torch.device) -> torch.cuda.Stream | None:
    """A stream for the warm-up and the captures of steps on ``device``; None where there are no streams.

    Not torch's default one for captures, which belongs to the device that the process used first.
    """
    return torch.cuda.Stream(device) if device.type == "cuda" else None


@contextmanager
def on_stream(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work within runs on ``stream``, between what the current stream has and will have to do; None: on that itself."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        current.wait_stream(stream)


@contextmanager
def watch_for_waits(note: Callable[[str], None]) -> Iterator[None]:
    """``note(place)`` is called, with file and line, where work within waits for the device and a capture would fail.

    The user's own debug mode stays in force: waits are still errors if they are, or shown if they are warned of.
    """
    caller = threading.current_thread()
    mode = torch.cuda.get_sync_debug_mode()
    show = warnings.showwarning

    def shown(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        if WAITS in str(message):
            thread = threading.current_thread()
            if thread is caller or isinstance(thread, threading._DummyThread):  # autograd's threads are not Python's
                note(f"{filename}:{lineno}")
            if mode != _WARN:
                return
        show(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=WAITS)
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")  # on entering it
        warnings.showwarning = shown
        torch.cuda.set_sync_debug_mode(max(mode, _WARN))
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)


class CapturedGraph:
    """``run()`` recorded into a CUDA graph; its outputs are overwritten by every replay.

    If it raises, the current stream, the allocator and the random generator are as they were.

    Args:
        run: makes the outputs; it is recorded, not carried out. It may not read a value on the host.
        pool: memory pool shared with other graphs that never run at the same time.
        stream: where it is recorded; its device is the graph's.
    """

    def __init__(self, run: Callable[[], Sequence[Tensor]], pool: Any, stream: torch.cuda.Stream) -> None:
        with torch.cuda.device(stream.device), _own_workspaces(), _no_collection():
            self._graph = torch.cuda.CUDAGraph()
            self._outputs = _record(self._graph, run, pool, stream)

    def replay(self) -> Sequence[Tensor]:
        self._graph.replay()
        return self._outputs


def _record(
    graph: torch.cuda.CUDAGraph, run: Callable[[], Sequence[Tensor]], pool: Any, stream: torch.cuda.Stream
) -> Sequence[Tensor]:
    before = torch.cuda.current_stream(stream.device)
    outputs: Sequence[Tensor] = ()
    failure: BaseException | None = None
    ended = False
    try:
        # A loader's thread may pin memory and ask after events meanwhile, which a global capture would not survive.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            try:
                outputs = run()
            except BaseException as error:  # the reason; that the capture cannot be ended then is none
                failure = error
        ended = True
    except BaseException as error:
        failure = failure or error
    if failure is None:
        return outputs
    try:
        if ended:
            graph.reset()
        else:
            _recover(graph, pool, stream, before)
        raise failure
    finally:
        del failure  # its traceback holds this frame and, with it, the tensors of the capture


def _recover(graph: torch.cuda.CUDAGraph, pool: Any, stream: torch.cuda.Stream, before: torch.cuda.Stream) -> None:
    """Undo what is left of a capture that CUDA broke off; ``torch.cuda.graph`` undoes only one that ended well."""
    device = stream.device.index
    torch.cuda.set_stream(stream)
    if torch.cuda.is_current_stream_capturing():  # where a layer has left another stream current
        with suppress(RuntimeError):
            graph.capture_end()
    torch.cuda.set_stream(before)
    graph.reset()
    _broken.append(graph)
    with suppress(RuntimeError):  # "not currently recording": this torch has done both
        give_back_pool(device, pool)
    # The generator of torch 2.11 is in capture mode until a capture ends well.
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        torch.zeros((), device=stream.device)


@contextmanager
def _own_workspaces() -> Iterator[None]:
    """Within, cuBLAS takes its workspaces from the graph's pool, and gives them back to it, as in torch's compiler.

    Those of the warm-up would be in the graph too, but torch frees them when it destroys any graph of this stream.
    """
    clear_cublas_workspaces()
    try:
        yield
    finally:
        clear_cublas_workspaces()


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage goes before and not within, where the end of an old graph or event would break off the capture."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

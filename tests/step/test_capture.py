"""What surrounds a capture, on a stand-in for ``torch.cuda`` that breaks in the ways torch 2.11 and later ones do."""

from __future__ import annotations

import _thread
import contextlib
import gc
import threading
import warnings
from pathlib import Path

import pytest
import torch

from auglocal_ext.step import capture
from auglocal_ext.step.capture import CapturedGraph, on_stream, watch_for_waits


class Stream:
    def __init__(self, name, log):
        self.name, self.device, self.log = name, torch.device("cuda", 1), log

    def wait_stream(self, other):
        self.log.append(f"{self.name} waits for {other.name}")


class FakeCuda:
    """The state of a process that a capture changes, as torch's sources have it.

    ``old`` is torch 2.11: a capture that CUDA has broken off raises at its end before anything is put back.
    """

    def __init__(self, old):
        self.old, self.log = old, []
        self.first, self.stream = Stream("first", self.log), Stream("capture", self.log)
        self.current = self.first
        self.device = None
        self.broken = False  # CUDA has broken off the capture
        self.capturing = False  # the stream is
        self.routed = []  # pools that allocations go to
        self.pools = {}  # references
        self.generator_captures = False

    def invalidate(self):
        self.broken = True
        raise RuntimeError("operation not permitted when stream is capturing")

    def install(self, monkeypatch):
        fake = self

        class Graph:
            ended = False

            def capture_end(self):
                if fake.current is not fake.stream:
                    raise RuntimeError("Capture must end on the same stream it began on.")
                fake.capturing = False
                if fake.broken and fake.old:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                fake.routed.remove(self.pool)
                if fake.broken:
                    raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
                fake.generator_captures = False
                self.ended = True

            def reset(self):
                if self.ended or not fake.old:
                    fake.pools[self.pool] -= 1
                    if self.pool in fake.routed:
                        fake.routed.remove(self.pool)
                self.ended = False

            def replay(self):
                fake.log.append("replay")

        class Capture:
            def __init__(self, graph, pool="of its own", stream=None, capture_error_mode="global"):
                assert capture_error_mode == "thread_local" and stream is fake.stream
                self.graph, graph.pool = graph, pool

            def __enter__(self):
                assert not fake.routed and not fake.capturing, "a capture is under way"
                fake.log.append(f"capture into {self.graph.pool}")
                self.before, fake.current = fake.current, fake.stream
                fake.broken, fake.capturing = False, True
                fake.routed.append(self.graph.pool)
                fake.pools[self.graph.pool] = fake.pools.get(self.graph.pool, 0) + 1
                fake.generator_captures = fake.old

            def __exit__(self, *args):
                self.graph.capture_end()
                fake.current = self.before

        @contextlib.contextmanager
        def use_device(device):
            fake.device, before = device, fake.device
            try:
                yield
            finally:
                fake.device = before

        @contextlib.contextmanager
        def use_stream(stream):
            fake.current, before = stream, fake.current
            try:
                yield
            finally:
                fake.current = before

        def end_allocation(device, pool):
            assert device == 1
            if pool not in fake.routed:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            fake.routed.remove(pool)

        def release(device, pool):
            fake.pools[pool] -= 1

        for name, value in {
            "CUDAGraph": Graph,
            "graph": Capture,
            "device": use_device,
            "stream": use_stream,
            "set_stream": lambda stream: setattr(fake, "current", stream),
            "current_stream": lambda device=None: fake.current,
            "is_current_stream_capturing": lambda: fake.capturing and fake.current is fake.stream,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name, value in {
            "_cuda_endAllocateToPool": end_allocation,
            "_cuda_releasePool": release,
            "_cuda_clearCublasWorkspaces": lambda: fake.log.append("workspaces cleared"),
        }.items():
            monkeypatch.setattr(torch._C, name, value, raising=False)
        monkeypatch.setattr(torch, "zeros", lambda *args, device: None)
        monkeypatch.setattr(capture, "_broken", [])
        monkeypatch.setattr(gc, "collect", lambda: fake.log.append("garbage collected"))


@pytest.fixture(params=[True, False], ids=["2.11", "later"])
def cuda(request, monkeypatch):
    fake = FakeCuda(request.param)
    fake.install(monkeypatch)
    return fake


def assert_as_before(cuda, pools):
    assert cuda.current is cuda.first and cuda.device is None
    assert not cuda.routed and not cuda.capturing and not cuda.generator_captures
    assert cuda.pools["pool"] == pools
    assert gc.isenabled()


def test_a_capture_runs_on_the_given_stream_without_garbage_collection_in_it(cuda):
    def run():
        assert cuda.current is cuda.stream and cuda.device == cuda.stream.device
        assert not gc.isenabled()
        cuda.log.append("run")
        return ["out"]

    graph = CapturedGraph(run, "pool", cuda.stream)
    assert graph.replay() == ["out"]
    before = ["workspaces cleared", "garbage collected", "capture into pool"]
    assert cuda.log == [*before, "run", "workspaces cleared", "replay"]
    assert_as_before(cuda, 1)


def test_collection_that_is_off_stays_off(cuda):
    gc.disable()
    try:
        CapturedGraph(list, "pool", cuda.stream)
        assert not gc.isenabled()
    finally:
        gc.enable()


def left_on_another_stream(cuda):
    cuda.current = cuda.first
    raise ValueError("by a layer")


def wrong(cuda):
    raise ValueError("by a layer")


def read(cuda):
    cuda.invalidate()


def read_and_go_on(cuda):
    with contextlib.suppress(RuntimeError):
        cuda.invalidate()
    return []


@pytest.mark.parametrize(
    ("run", "error"),
    [
        (wrong, "by a layer"),
        (read, "not permitted"),
        (read_and_go_on, "previous error during capture"),
        (left_on_another_stream, "by a layer"),
    ],
)
def test_a_capture_that_fails_leaves_everything_as_it_was(cuda, run, error):
    kept = CapturedGraph(list, "pool", cuda.stream)  # another graph in the same pool
    with pytest.raises((RuntimeError, ValueError), match=error):
        CapturedGraph(lambda: run(cuda), "pool", cuda.stream)
    assert_as_before(cuda, 1)
    CapturedGraph(list, "pool", cuda.stream)  # the next one succeeds
    assert kept.replay() == []


@pytest.mark.parametrize("fails", [False, True])
def test_work_on_a_stream_comes_between_that_of_the_current_one(cuda, fails):
    with contextlib.suppress(ValueError), on_stream(cuda.stream):
        assert cuda.current is cuda.stream
        cuda.log.append("work")
        if fails:
            raise ValueError
    assert cuda.current is cuda.first
    assert cuda.log == ["capture waits for first", "work", "first waits for capture"]
    with on_stream(None):
        assert cuda.current is cuda.first


@pytest.fixture
def debug_mode(monkeypatch):
    modes = [0]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])

    def enter(mode):
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)
        modes.append(mode)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", enter)
    return modes


def wait():
    warnings.warn(capture.WAITS, stacklevel=2)


@pytest.mark.parametrize("mode", [0, 1, 2], ids=["default", "warn", "error"])
def test_waits_are_noted_and_the_users_mode_stays(debug_mode, mode):
    debug_mode.append(mode)
    places = []
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with contextlib.suppress(ValueError), watch_for_waits(places.append):
            assert debug_mode[-1] == max(mode, 1)
            wait()
            warnings.warn("another", stacklevel=1)
            other = threading.Thread(target=wait)
            other.start()
            other.join()
            done = threading.Event()
            _thread.start_new_thread(lambda: (wait(), done.set()), ())  # autograd's threads look like this one
            assert done.wait(10)
            raise ValueError
    assert debug_mode[-1] == mode
    assert len(places) == 2 and all(place.startswith(f"{__file__}:") for place in places)
    ours = [str(w.message) for w in shown if capture.WAITS in str(w.message)]
    assert len(ours) == (3 if mode == 1 else 0)
    assert [str(w.message) for w in shown if str(w.message) not in ours] == ["another"]


def test_a_filter_that_makes_warnings_errors_does_not_break_a_step(debug_mode):
    places = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with watch_for_waits(places.append):
            wait()
    assert len(places) == 1


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="torch is built without CUDA")
def test_torch_has_the_private_functions_and_the_words_that_are_used():
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool", "_cuda_clearCublasWorkspaces"):
        assert callable(getattr(torch._C, name)), name
    (library,) = (Path(torch.__file__).parent / "lib").glob("*c10_cuda.*")
    assert capture.WAITS.encode() in library.read_bytes()

"""The order in which two streams run local modules, checked on streams that only keep account of it."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from step_nets import small

from auglocal_ext import LocalOutput
from auglocal_ext.step import LocalStep
from auglocal_ext.step.overlap import TwoStreams


class Stream:
    """Knows how far it has come and, through events, how far the others had come before."""

    def __init__(self, name):
        self.name = name
        self.done = {}  # stream -> number of that stream's operations known to be finished

    def work(self):
        self.done[self.name] = self.done.get(self.name, 0) + 1
        return (self.name, self.done[self.name])

    def has_passed(self, operation):
        stream, position = operation
        return self.done.get(stream, 0) >= position

    def record_event(self):
        return dict(self.done)

    def wait_event(self, event):
        for stream, position in event.items():
            self.done[stream] = max(self.done.get(stream, 0), position)

    def wait_stream(self, other):
        self.wait_event(other.done)


@pytest.fixture
def streams(monkeypatch):
    current = [Stream("first")]

    @contextlib.contextmanager
    def use(stream):
        current.append(stream)
        try:
            yield
        finally:
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", use)
    second = Stream("second")
    return current, second


@pytest.mark.parametrize("context", [0, 2], ids=["chain", "each module receives two earlier inputs"])
def test_order_and_reuse_of_memory(streams, context):
    current, second = streams
    first = current[0]
    before = first.work()
    plan = TwoStreams(torch.device("cuda"), second)
    inputs = {}  # reader -> (weak reference to its input, the stream it was made on)
    forwards, ends = {}, {}
    history = []
    for index in range(9):
        with plan.module(index):
            here = current[-1]
            assert here is (second if index % 2 else first)
            # The block of a tensor that is gone goes to the next tensor of the stream it was made on.
            for reader, (reference, made_on) in inputs.items():
                if reference() is None:
                    assert all(made_on.has_passed(end) for r, end in ends.items() if r <= reader + context)
            assert here.has_passed(before)
            if index:
                assert here.has_passed(forwards[index - 1])
            if index >= 2:
                assert here.has_passed(ends[index - 2])  # so two modules at most are alive
            if index and index % 2 == 1:
                assert not here.has_passed(ends[index - 1])  # or nothing would overlap
            h = torch.zeros(2)
            forwards[index] = here.work()
            inputs[index + 1] = (weakref.ref(h.untyped_storage()), here)
            plan.handed_on(index, h, history)
            history = ([*history, h] if context else [])[-context:]
            del h
            ends[index] = here.work()
    plan.join()
    assert all(first.has_passed(end) for end in ends.values())
    history.clear()
    gc.collect()
    assert all(reference() is None for reference, _ in inputs.values())
    assert sum(1 for r in range(1, 6) if inputs[r][0]() is None) == 5


def test_inputs_are_let_go_of_after_three_modules(streams):
    _, second = streams
    plan = TwoStreams(torch.device("cuda"), second)
    alive = []
    references = []
    for index in range(9):
        with plan.module(index):
            alive.append(sum(reference() is not None for reference in references))
            h = torch.zeros(2)
            references.append(weakref.ref(h.untyped_storage()))
            plan.handed_on(index, h, ())
            del h
    assert max(alive) == 3


def test_a_module_that_fails_leaves_no_stream_behind(streams):
    current, second = streams
    plan = TwoStreams(torch.device("cuda"), second)
    plan.join()  # nothing has begun
    with plan.module(0):
        plan.handed_on(0, torch.zeros(2), [])
    with pytest.raises(ValueError), plan.module(1):
        last = second.work()
        raise ValueError
    plan.join()
    assert len(current) == 1 and current[0].has_passed(last)


@pytest.mark.parametrize("joins", [True, False], ids=["", "in a capture that CUDA has broken off"])
def test_a_step_that_fails_joins_its_streams_and_says_why_it_failed(monkeypatch, joins):
    step = LocalStep(small(), lambda params: torch.optim.SGD(params, lr=0.1), graph=False)
    joined = []

    class Streams:
        def join(self):
            joined.append(self)
            if not joins:
                raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def fails(*arguments):
        raise RuntimeError("by a layer")

    monkeypatch.setattr("auglocal_ext.step.local_step.OneStream", Streams)
    monkeypatch.setattr("auglocal_ext.step.local_step.updating_pass", fails)
    with pytest.raises(RuntimeError, match="by a layer"):
        step._run(torch.zeros(1), None)
    assert len(joined) == 1


def test_all_steps_share_the_second_stream(monkeypatch):
    """Libraries and the allocator keep memory for each stream, of which torch would hand out another every time."""
    made = []

    class Fake:
        def __init__(self, device):
            self.device = device
            made.append(self)

    step = LocalStep(small(), lambda params: torch.optim.SGD(params, lr=0.1), graph=False, overlap=True)
    used = []
    monkeypatch.setattr(torch.cuda, "Stream", Fake)
    monkeypatch.setattr("auglocal_ext.step.local_step.TwoStreams", lambda device, second: used.append(second))
    monkeypatch.setattr("auglocal_ext.step.local_step.updating_pass", lambda *_: LocalOutput(*[torch.zeros(())] * 4))

    class OnCuda:
        is_cuda, device = True, torch.device("cuda", 0)

        def __len__(self):
            return 1

    for _ in range(3):
        step._run(OnCuda(), None)
    assert used == made * 3 and len(made) == 1

"""What is planned for two streams is what they hold, and the choice is the best of all."""

from __future__ import annotations

import itertools
import weakref
from collections import deque

import pytest
import torch
from test_plan import BATCH, WAYS, images, sgd, wrap
from torch.utils._python_dispatch import TorchDispatchMode

from auglocal_ext import AugLocal, ContSup
from auglocal_ext.local_modules import OneStream
from auglocal_ext.memory.meter import rounded
from auglocal_ext.planning import plan_memory
from auglocal_ext.planning.choice import Choice, Costs, cheapest_within, lowest_peak
from auglocal_ext.planning.estimate import ModuleCost
from auglocal_ext.step import LocalStep
from auglocal_ext.step.updates import updating_pass


class PerStream(OneStream):
    """Two streams as they hold memory: what modules of one make is counted there, inputs stay for three modules."""

    def __init__(self):
        self.stream = 0
        self.kept = deque()

    def module(self, index):
        self.stream = index % 2
        while self.kept and self.kept[0][0] <= index - 3:
            self.kept.popleft()
        return super().module(index)

    def handed_on(self, index, h, history):
        self.kept.append((index + 1, [h, *(t for t in history if t is not None)]))


class StreamMeter(TorchDispatchMode):
    """Most bytes alive of what was made while each stream ran."""

    def __init__(self, streams):
        super().__init__()
        self.streams, self.live, self.most, self.known = streams, [0, 0], [0, 0], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, torch.Tensor) and func is not torch.ops.prim.device.default:
                self.note(item.untyped_storage(), self.streams.stream)
        return out

    def note(self, storage, stream):
        key, size = storage._cdata, rounded(storage.nbytes())
        if key not in self.known:
            self.known[key] = weakref.finalize(storage, self.forget, key, stream, size)
            self.live[stream] += size
            self.most[stream] = max(self.most[stream], self.live[stream])

    def forget(self, key, stream, size):
        del self.known[key]
        self.live[stream] -= size


@pytest.mark.slow
@pytest.mark.parametrize("rule", [AugLocal(2), ContSup("R0"), ContSup("R2E"), ContSup("R4")], ids=str)
@pytest.mark.parametrize("way", ["none", "all"])
def test_overlap_is_what_two_streams_hold(rule, way):
    """They are played by one: a stream's memory is what its modules have made and not let go of."""
    net = wrap(rule, depth=14)
    predicted = plan_memory(net, BATCH, sgd, recompute=way, overlap=True)
    step = LocalStep(net, sgd, recompute=way)
    x, y = images()
    step(x, y)
    streams = PerStream()
    with StreamMeter(streams) as meter:
        for tensor in (x, y, *net.parameters(), *net.buffers()):
            meter.known[tensor.untyped_storage()._cdata] = None
        for state in step.optimizer.state.values():
            meter.known[state["momentum_buffer"].untyped_storage()._cdata] = None
        updating_pass(net.local_modules, x, y, step._updates, None, streams)
    held = predicted.base_bytes + sum(meter.most)
    assert held <= predicted.predicted_bytes <= (1.001 if len(net.context) == 0 else 1.1) * held


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("modules", [1, 2, 5])
def test_the_choice_is_the_best_of_all(modules, overlap):
    """Against every mixture of five modules, for every budget that makes a difference."""
    generator = torch.Generator().manual_seed(modules)

    def random_cost(rank):
        size = torch.randint(10, 100, (modules, 3), generator=generator).tolist()
        return [
            ModuleCost(before=1000 + 7 * k, added=added, input=7 * k % 5, flops=100 + rank * flops)
            for k, (added, flops, _) in enumerate(size)
        ]

    ways = (*WAYS, 1)
    by_way = [random_cost(rank) for rank in range(len(ways))]
    by_module = [dict(zip(ways, costs, strict=True)) for costs in zip(*by_way, strict=True)]
    costs = Costs(by_module, base=1000, end=1040, history=False)
    every = [Choice(chosen, overlap) for chosen in itertools.product(ways, repeat=modules)]
    sizes = sorted({costs.bytes(choice) for choice in every})
    assert costs.bytes(lowest_peak(costs, overlap)) == sizes[0]
    for budget in sizes:
        found = cheapest_within(costs, budget, overlap)
        assert costs.bytes(found) <= budget
        assert costs.recomputed(found) == min(costs.recomputed(c) for c in every if costs.bytes(c) <= budget)
    assert cheapest_within(costs, sizes[0] - 1, overlap) is None
    best = [c for c in every if costs.bytes(c) == sizes[0]]
    assert costs.recomputed(lowest_peak(costs, overlap)) == min(costs.recomputed(choice) for choice in best)

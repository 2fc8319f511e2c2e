"""The memory of captured steps on a GPU."""

from __future__ import annotations

import pytest
import torch
from step_nets import small
from test_step_on_gpu import SWITCHES, on_gpu, sgd

from auglocal_ext import AugLocal, LocalSequential, models
from auglocal_ext.memory import release_device_memory
from auglocal_ext.step import LocalStep

pytestmark = pytest.mark.gpu


def big_step(**options):
    torch.manual_seed(0)
    net = LocalSequential(models.resnet32(), AugLocal(6), 10, (3, 32, 32)).cuda().to(memory_format=torch.channels_last)
    return LocalStep(net, sgd, autocast=torch.bfloat16, **options)


def test_the_captured_peak_is_the_eager_one():
    x = torch.randn(256, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (256,), device="cuda")
    peaks = {}
    for graph in (False, True):
        step = big_step(graph=graph)
        for _ in range(5):
            step(x, y)
        release_device_memory()
        for _ in range(3):
            step(x, y)
        torch.cuda.synchronize()
        # A graph's pool counts as allocated only while it is recorded; what it holds for good is reserved.
        peaks[graph] = torch.cuda.max_memory_reserved()
        del step
    assert peaks[True] <= 1.05 * peaks[False]


@pytest.mark.slow
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_ten_thousand_replays_reserve_no_more_memory(switches):
    step = LocalStep(small().cuda(), sgd, graph=True, **switches)
    x, y = next(on_gpu(1))
    for _ in range(10):
        step(x, y)
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    for _ in range(10_000):
        out = step(x, y)
    assert torch.isfinite(out.loss)
    assert torch.cuda.memory_reserved() == reserved


def test_the_graph_of_the_last_batch_takes_no_memory_of_its_own():
    x = torch.randn(256, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (256,), device="cuda")
    step = big_step(graph=True)
    for _ in range(5):
        step(x, y)
    step(x[:200], y[:200])
    release_device_memory()
    before = torch.cuda.memory_reserved()
    step(x, y)
    step(x[:200], y[:200])
    assert step.graphed
    release_device_memory()
    assert torch.cuda.memory_reserved() <= 1.05 * before

"""``step.times``: the parts of a step add up."""

from __future__ import annotations

import time

import pytest
import torch

from auglocal_ext import AugLocal, LocalSequential, LocalStep, models
from auglocal_ext.distributed import StepTimes
from auglocal_ext.distributed.times import KEPT, spent


def test_parts_of_steps_add_up():
    times = StepTimes()
    with spent("waiting"):
        time.sleep(0.01)  # of no step
    assert times.total == times.waiting == 0
    for _ in range(KEPT + 2):
        with times.step():
            with spent("waiting"):
                time.sleep(0.004)
            time.sleep(0.002)
            with spent("sending"):
                time.sleep(0.001)
    assert times.batches == KEPT + 2
    assert times.waiting >= 0.004 * times.batches and times.sending >= 0.001 * times.batches
    assert times.busy >= 0.002 * times.batches and times.averaging == 0
    assert times.busy + times.waiting + times.sending == pytest.approx(times.total)
    assert [batch for batch, _ in times.recent] == list(range(2, KEPT + 2))
    for _, spans in times.recent:
        waiting, sending, step = spans
        assert (waiting.kind, sending.kind, step.kind) == ("waiting", "sending", "step")
        assert step.start <= waiting.start < waiting.end <= sending.start < sending.end <= step.end


def test_a_step_that_fails_ends_its_time():
    times = StepTimes()
    with pytest.raises(KeyError), times.step():
        raise KeyError
    with spent("waiting"):
        pass
    assert times.waiting == 0 and times.batches == 0


def test_one_process_is_not_timed():
    net = LocalSequential(models.resnet_cifar(8, width=4), AugLocal(depth=2), 10, (3, 16, 16))
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.1))
    assert step.times is None

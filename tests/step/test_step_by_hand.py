"""An optimizer's step by hand around LocalStep's own."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from step_nets import assert_same_state, batches, plain_step, small, twins
from test_local_step import sgd

from auglocal_ext.step import LocalStep


class Counting(torch.optim.SGD):
    """Counts its steps in an option, with gradients or without, as some optimizers do."""

    def __init__(self, params):
        super().__init__(params, lr=0.1, momentum=0.9, weight_decay=1e-2)
        self.param_groups[0]["k"] = 0

    def step(self, closure=None):
        self.param_groups[0]["k"] += 1
        return super().step(closure)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_by_hand_after_an_update_does_nothing(accumulate):
    net, other = twins()
    step, plain = (LocalStep(each, Counting, accumulate=accumulate) for each in (net, other))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scheduler = torch.optim.lr_scheduler.StepLR(step.optimizer, 1, gamma=1.0)
        assert not step.updated
        for i, (x, y) in enumerate(batches(4)):
            plain(x, y)
            if accumulate == 1:
                assert step.optimizer.step(lambda: step(x, y)).module_losses.isfinite().all()  # noqa: B023
            else:
                step(x, y)
            assert step.updated == ((i + 1) % accumulate == 0)
            if step.updated:
                step.optimizer.step()
                scheduler.step()
    assert_same_state(net, other)
    assert step.optimizer.param_groups[0]["k"] == plain.optimizer.param_groups[0]["k"]


def test_a_step_by_hand_within_an_accumulation_is_refused():
    step = LocalStep(small(), sgd, accumulate=3)
    x, y = next(batches(1))
    for calls in (1, 2):
        step(x, y)
        with pytest.raises(RuntimeError, match=f"after {calls} of the 3 calls.*only where step.updated is true"):
            step.optimizer.step()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_by_hand_applies_the_gradients_of_another_pass(accumulate):
    net, other = twins()
    step, plain = LocalStep(net, sgd, accumulate=accumulate), sgd(other.parameters())
    x, y = next(batches(1))
    plain_step(other, plain, x, y)
    net(x, y).loss.backward()
    step.optimizer.step()
    assert_same_state(net, other)


def test_a_step_by_hand_applies_the_gradients_of_another_pass_after_an_update_too():
    net, other = twins()
    step, plain = LocalStep(net, sgd), sgd(other.parameters())
    x, y = next(batches(1))
    for _ in range(2):
        plain_step(other, plain, x, y)
    step(x, y)
    assert step.updated
    net(x, y).loss.backward()
    step.optimizer.step()
    assert_same_state(net, other)


def test_the_step_by_hand_makes_no_cycle():
    step = LocalStep(small(), sgd)
    step(*next(batches(1)))
    gone = weakref.ref(step.optimizer)
    gc.disable()
    try:
        del step
        assert gone() is None
    finally:
        gc.enable()

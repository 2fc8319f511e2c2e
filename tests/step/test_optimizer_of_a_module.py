"""What steps a module is the user's own optimizer: attributes, hooks and classes of any kind are as in a plain loop."""

from __future__ import annotations

import pytest
import torch
from step_nets import assert_same_state, batches, plain_step, twins
from torch.optim.optimizer import register_optimizer_step_post_hook

from auglocal_ext import LocalStep


class Average(torch.optim.Optimizer):
    """Weighs its steps by what it counts in an attribute, which its state dict holds."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.125})
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad / self.count)

    def state_dict(self):
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]
        super().load_state_dict(state)


class Scaled(torch.optim.SGD):
    """Multiplies gradients by an attribute."""

    def __init__(self, params):
        super().__init__(params, lr=0.1)
        self.factor = 0.5

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(self.factor)
        return super().step(closure)


class Slotted(Scaled):
    __slots__ = ("factor",)


def test_an_attribute_that_counts_steps_is_that_of_a_plain_loop_and_is_saved():
    net, other = twins()
    plain, step = Average(other.parameters()), LocalStep(net, Average)
    for x, y in batches(3):
        plain_step(other, plain, x, y)
        step(x, y)
        assert step.optimizer.count == plain.count
    assert step.optimizer.state_dict()["count"] == 3
    third, _ = twins()
    third.load_state_dict(net.state_dict())
    resumed = LocalStep(third, Average)
    resumed.load_state_dict(step.state_dict())
    for x, y in batches(2):
        plain_step(other, plain, x, y)
        resumed(x, y)
    assert_same_state(third, other)


@pytest.mark.parametrize("make", [Scaled, Slotted])
def test_an_attribute_set_between_steps_counts(make):
    net, other = twins()
    plain, step = make(other.parameters()), LocalStep(net, make)
    for factor, (x, y) in zip((0.5, 0.25, 2.0), batches(3), strict=True):
        plain.factor = step.optimizer.factor = factor
        plain_step(other, plain, x, y)
        step(x, y)
    assert_same_state(net, other)


def test_hooks_get_the_optimizer_itself_once_for_each_module():
    net, _ = twins()
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.1))
    seen, every = [], []
    step.optimizer.register_step_pre_hook(lambda optimizer, args, options: seen.append(optimizer))
    step.optimizer.register_step_post_hook(
        lambda optimizer, args, options: seen.append({id(p) for p in optimizer.param_groups[0]["params"]})
    )
    handle = register_optimizer_step_post_hook(lambda optimizer, args, options: every.append(optimizer))
    try:
        step(*next(batches(1)))
    finally:
        handle.remove()
    own = [{id(p) for p in module.parameters()} for module in net.local_modules]
    assert all(optimizer is step.optimizer for optimizer in [*seen[::2], *every])
    assert seen[1::2] == own and len(every) == len(own) > 1


def test_a_step_that_breaks_off_leaves_the_optimizer_whole():
    class Broken(Average):
        def step(self, closure=None):
            super().step(closure)
            raise RuntimeError("in the step")

    net, _ = twins()
    step = LocalStep(net, Broken)
    held = list(step.optimizer.param_groups[0]["params"])
    with pytest.raises(RuntimeError, match="in the step"):
        step(*next(batches(1)))
    assert list(map(id, step.optimizer.param_groups[0]["params"])) == list(map(id, held))
    assert step.optimizer.count == 0

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


class Counting(torch.optim.SGD):
    """Its rate falls with the steps, which it counts in a slot."""

    __slots__ = ("count",)

    def __init__(self, params):
        super().__init__(params, lr=0.125)
        self.count = 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            group["lr"] = 0.125 / self.count
        return super().step(closure)


def test_a_slot_that_counts_steps_is_that_of_a_plain_loop():
    net, other = twins()
    plain, step = Counting(other.parameters()), LocalStep(net, Counting)
    for x, y in batches(3):
        plain_step(other, plain, x, y)
        step(x, y)
    assert step.optimizer.count == plain.count == 3
    assert_same_state(net, other)


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer, and every second time goes back half of the way."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.125})
        self.fast, self.count = torch.optim.SGD(params, lr=0.125, momentum=0.5), 0

    @torch.no_grad()
    def step(self, closure=None):
        self.fast.step()
        self.count += 1
        for p in (p for group in self.param_groups for p in group["params"]):
            slow = self.state[p].setdefault("slow", p.clone())
            if self.count % 2 == 0:
                p.copy_(slow.lerp_(p, 0.5))


def test_an_optimizer_around_another_one_steps_as_in_a_plain_loop():
    net, other = twins()
    plain, step = Lookahead(list(other.parameters())), LocalStep(net, Lookahead)
    for x, y in batches(4):
        plain_step(other, plain, x, y)
        step(x, y)
    assert_same_state(net, other)


def test_an_optimizer_around_another_one_is_refused_where_several_modules_have_gradients():
    net, _ = twins()
    with pytest.raises(ValueError, match="accumulate=2: Lookahead steps another optimizer, fast"):
        LocalStep(net, Lookahead, accumulate=2)
    LocalStep(net, Lookahead, accumulate=2, clip_norm=1.0, clip="global")

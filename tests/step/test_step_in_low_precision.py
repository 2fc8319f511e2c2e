"""LocalStep with float16, a loss scaler and autocast is the plain loop with them."""

from __future__ import annotations

import pytest
import torch
from step_nets import assert_same_state, batches, small, twins
from test_local_step import sgd

from auglocal_ext.step import LocalStep


def test_fp16_skips_the_module_that_overflows_and_steps_the_others():
    net = small()
    hit = net.local_modules[1]
    next(iter(hit.parameters())).register_hook(lambda g: g * float("inf"))
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    step = LocalStep(net, sgd, autocast=torch.float16, grad_scaler=scaler)
    before = {id(p): p.detach().clone() for p in net.parameters()}
    step(*next(batches(1)))
    for module in net.local_modules:
        moved = [not torch.equal(p, before[id(p)]) for p in module.parameters()]
        assert any(moved) == (module.index != hit.index)
    assert scaler.get_scale() == 8.0


def test_fp16_is_the_plain_loop_with_a_scaler():
    net, other = twins()
    scaler, ours = (torch.amp.GradScaler("cpu", init_scale=16.0, growth_interval=2) for _ in range(2))
    plain, step = sgd(other.parameters()), LocalStep(net, sgd, autocast=torch.float16, grad_scaler=ours)
    for x, y in batches(3):
        with torch.autocast("cpu", dtype=torch.float16):
            out = other(x, y, grad_scaler=scaler)
        plain.zero_grad()
        scaler.scale(out.loss).backward()
        scaler.step(plain)
        scaler.update()
        step(x, y)
    for (name, value), (_, theirs) in zip(net.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(value, theirs, rtol=1e-5, atol=1e-6, msg=name)
    assert step.state_dict()["grad_scaler"]["scale"] == scaler.get_scale() == 32.0
    assert isinstance(LocalStep(net, sgd, autocast=torch.float16).grad_scaler, torch.amp.GradScaler)


def test_fp16_goes_on_after_a_step_that_broke_off():
    net = small()
    broken = net.local_modules[2].layers[0]
    step = LocalStep(net, sgd, autocast=torch.float16)
    x, y = next(batches(1))
    handle = broken.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(x, y)
    handle.remove()
    assert all(p.grad is None for p in net.parameters())
    step(x, y)


@pytest.mark.parametrize("how", ["argument", "surrounding"])
def test_autocast_is_that_of_the_plain_loop(how):
    net, other = twins()
    plain = sgd(other.parameters())
    step = LocalStep(net, sgd, autocast=torch.bfloat16 if how == "argument" else None)
    for x, y in batches(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = other(x, y)
        plain.zero_grad()
        out.loss.backward()
        plain.step()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "surrounding"):
            step(x, y)
    assert_same_state(net, other)


def test_fp16_without_a_scaler_is_warned_of():
    step = LocalStep(small(), sgd)
    with torch.autocast("cpu", dtype=torch.float16), pytest.warns(UserWarning, match="grad_scaler"):
        step(*next(batches(1)))

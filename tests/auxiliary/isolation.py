"""What holds for every network whose auxiliary blocks are copies: they have no value of it, and train apart from it."""

from __future__ import annotations

import torch


def assert_same_values(net, of_spoiled):
    """The auxiliary networks of ``net`` have the values of those of a model without valid ones."""
    found, again = net.auxiliary.state_dict(), of_spoiled.auxiliary.state_dict()
    assert list(found) == list(again) and found
    for name, value in found.items():
        assert torch.equal(value, again[name]) and not value.isnan().any(), name
        assert not name.endswith("num_batches_tracked") or value == 0, name


def assert_gradient_isolated(net, x, y):
    """Each local loss reaches all parameters of its auxiliary network, and none outside its module."""
    for module in net.local_modules[:-1]:
        h = module(x)
        module.local_loss(h, y).backward()
        trained = set(module.parameters())
        assert all(parameter.grad is None for parameter in net.parameters() if parameter not in trained)
        assert all(parameter.grad is not None for parameter in net.auxiliary[module.index].parameters())
        net.zero_grad(set_to_none=True)
        x = h.detach()

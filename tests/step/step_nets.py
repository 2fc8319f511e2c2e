"""Small networks, batches and a plain training loop, which LocalStep is compared with."""

from __future__ import annotations

import copy

import torch

from auglocal_ext import AugLocal, ContSup, LocalSequential, models

RULES = {"auglocal": AugLocal(2), "contsup": ContSup("R1E")}


def small(rule="auglocal", **options):
    torch.manual_seed(7)
    return LocalSequential(models.resnet_cifar(8, width=4), RULES[rule], 10, (3, 16, 16), **options)


def twins(rule="auglocal", **options):
    net = small(rule, **options)
    return net, copy.deepcopy(net)


def batches(steps, n=6, size=16):
    generator = torch.Generator().manual_seed(11)
    for _ in range(steps):
        yield torch.randn(n, 3, size, size, generator=generator), torch.randint(0, 10, (n,), generator=generator)


def plain_step(net, optimizer, x, y):
    """One pass, then one optimizer step over everything: what LocalStep must come to."""
    out = net(x, y)
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
    return out


def assert_same_state(net, other):
    for (name, value), (_, theirs) in zip(net.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(value, theirs), name

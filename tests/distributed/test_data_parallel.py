"""A LocalSequential within DistributedDataParallel."""

from __future__ import annotations

import pytest
import torch
from ranks import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from auglocal_ext import ContSup, LocalSequential


def network():
    torch.manual_seed(7)
    layers = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    return LocalSequential(layers, ContSup("R0", "0c1f"), 4, (12,))


def grads(net):
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def _trained(rank, x, y, expected):
    net = network()
    ddp = DistributedDataParallel(net)
    for _ in range(2):  # the second iteration is where wrong hook use shows
        net.zero_grad()
        ddp(x[rank::2], y[rank::2]).loss.backward()
    found = grads(net)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad)


@pytest.mark.slow
def test_gradients_are_those_of_the_whole_batch():
    x, y = torch.randn(8, 12), torch.randint(0, 4, (8,))
    net = network()
    net(x, y).loss.backward()
    run(2, _trained, x, y, grads(net))

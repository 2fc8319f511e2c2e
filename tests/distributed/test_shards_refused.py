"""Parameters that cannot be sharded are refused with the way out."""

from __future__ import annotations

import pytest
import torch
from language import wrapped
from replicated import mesh as replicas
from replicated import network, sgd
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from auglocal_ext import SOLO, Greedy, LocalSequential, LocalStep, localize


def _linears(*widths, rule=None):
    return LocalSequential(nn.Sequential(*map(nn.Linear, widths, widths[1:])), rule or Greedy(), widths[-1], widths[:1])


@pytest.fixture
def lonely():
    """A process group of two whose other process is not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.layer(x) * self.scale


@pytest.mark.filterwarnings("ignore:local modules 0 and 1 share")
def test_parameters_that_cannot_be_sharded_are_refused(lonely):
    def refused(net, message, error=ValueError):
        with pytest.raises(error, match=message):
            LocalStep(net, sgd, mesh=replicas(2), shard=True)

    refused(
        LocalSequential(nn.Sequential(Scaled(), nn.Linear(6, 4)), Greedy(), 4, (6,)),
        "primary.0.scale is a single number, which is not sharded; give it the shape",
    )
    refused(network("greedy").to(memory_format=torch.channels_last), "conv.weight is not contiguous, and torch shards")
    net = _linears(6, 6, 6, 4)
    net.primary[1].weight = net.primary[0].weight
    refused(net, r"local modules 0 and 1 share primary\.0\.weight, and a parameter is whole only while")
    refused(wrapped(SOLO(), 2), r"SOLO\(.*read other layers' parameters.*leave shard out, or let .*readout=\"private\"")
    net = _linears(6, 6, 4)
    net.primary[0].weight.register_hook(lambda g: g)
    refused(net, "primary.0.weight has a hook, which would not run")
    for step in ({"shard": True}, {}):
        net = network("greedy", fused=False)
        fully_shard(net.primary[0], mesh=replicas(2))
        with pytest.raises(RuntimeError, match="are sharded: .*Leave fully_shard.*shard=True.* shards them itself"):
            LocalStep(net, sgd, mesh=replicas(2), **step)


class SharedScale(nn.Module):
    """A parameter of the model itself that all blocks use."""

    def __init__(self):
        super().__init__()
        self.layers, self.scale = nn.ModuleList(nn.Linear(6, 6) for _ in range(5)), nn.Parameter(torch.ones(6))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x) * self.scale)
        return x


class Kept(nn.Module):
    """Runs a parameter that it keeps in a list."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.weights = [self.two.weight]

    def forward(self, x):
        return self.head(F.linear(self.one(x), self.weights[0], self.two.bias))


@pytest.mark.filterwarnings("ignore:local modules .* share")
def test_parameters_of_localized_models_that_cannot_be_sharded_are_refused(lonely):
    net = localize(SharedScale(), Greedy(), 6, input_shape=(6,), layout="channels_last")
    with pytest.raises(ValueError, match=r"local modules 1 and 2 share primary\.scale, and a parameter is whole only"):
        LocalStep(net, sgd, mesh=replicas(2), shard=True)
    net = localize(Kept(), Greedy(), 6, input_shape=(6,), layout="channels_last")
    with pytest.raises(
        ValueError, match=r"Kept keeps primary\.two\.weight beside its parameters, in its attribute weights,"
    ):
        LocalStep(net, sgd, mesh=replicas(2), shard=True)


def test_shards_are_of_several_replicas():
    with pytest.raises(ValueError, match="shard=True is for several replicas"):
        LocalStep(network("greedy"), sgd, shard=True)

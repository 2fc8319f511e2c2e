"""Process groups, sharded layers and wrappers around the network: right, or refused with the way out."""

from __future__ import annotations

import pytest
import torch
from test_nothing_silent import batch, network, sgd
from torch import nn

from auglocal_ext import (
    MAN,
    Greedy,
    LocalSequential,
    LocalStep,
    models,
)


@pytest.fixture
def process_group(request):
    """A process group of the asked size whose other processes are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("process_group", [2], indirect=True)
def test_a_step_among_several_processes_is_refused(process_group):
    with pytest.raises(RuntimeError, match="one of 2 processes, and without mesh= .*mesh_dim_names="):
        LocalStep(network(Greedy()), sgd)


def test_a_step_that_comes_to_be_among_several_processes_is_refused():
    from torch.testing._internal.distributed.fake_pg import FakeStore

    step = LocalStep(network(Greedy()), sgd)
    step(*batch())
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(RuntimeError, match="one of 2"):
            step(*batch())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("process_group", [1], indirect=True)
def test_one_process_of_a_group_steps(process_group):
    assert LocalStep(network(Greedy()), sgd)(*batch()).loss.isfinite()


def _shard(parts, one_by_one):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for part in list(parts) if one_by_one else [parts]:
        fully_shard(part, mesh=mesh)


SHARDED = "parameters of this network are sharded.*Leave fully_shard"


@pytest.mark.parametrize("process_group", [2], indirect=True)
@pytest.mark.parametrize("which", ["one by one", "the network"])
def test_sharded_layers_are_refused(process_group, which):
    net = network(MAN(), fused=False)
    _shard(net.primary if which == "one by one" else net, which == "one by one")
    with pytest.raises(RuntimeError, match=SHARDED):
        net(*batch())
    if which == "one by one":
        with pytest.raises(RuntimeError, match="MAN's average cannot follow a block whose parameters are sharded"):
            net.local_modules[0].after_step()


@pytest.mark.parametrize("process_group", [2], indirect=True)
@pytest.mark.parametrize("rule", [Greedy(), MAN()], ids=repr)
@pytest.mark.parametrize("one_by_one", [True, False])
def test_layers_that_were_sharded_before_are_refused(process_group, rule, one_by_one):
    layers = models.resnet_cifar(14, width=4)
    _shard(layers, one_by_one)
    with pytest.raises(RuntimeError, match=SHARDED):
        LocalSequential(layers, rule, 10, (3, 16, 16))


@pytest.mark.parametrize("process_group", [1], indirect=True)
def test_layers_in_fullyshardeddataparallel_are_refused(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = network(Greedy(), fused=False)
    net.primary[1] = FullyShardedDataParallel(net.primary[1], use_orig_params=True, device_id=torch.device("cpu"))
    with pytest.raises(RuntimeError, match=SHARDED):
        net(*batch())
    with pytest.raises(RuntimeError, match=SHARDED):
        LocalSequential(net.primary, Greedy(), 10, (3, 16, 16))
    other = network(Greedy())
    other.primary[1] = nn.Identity()  # fewer parameters are not sharded ones
    other(*batch())


def test_a_list_of_layers_is_refused_with_the_way_out():
    with pytest.raises(TypeError, match=r"must be an nn.Sequential .* got list; nn.Sequential\(\*layers\) makes one"):
        LocalSequential([nn.Linear(3, 4), nn.Linear(4, 10)], Greedy(), 10, (3,))


def test_wrapped_networks_and_optimizers_that_are_none():
    net = network(Greedy())
    with pytest.raises(TypeError, match="net must be a LocalSequential, got Sequential; wrap the network first"):
        LocalStep(net.primary, sgd)
    with pytest.raises(TypeError, match="optimizer must be a function .*lambda params: torch.optim.SGD.*got SGD"):
        LocalStep(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(TypeError, match="optimizer must be a function .* got str"):
        LocalStep(net, "sgd")


@pytest.mark.parametrize("process_group", [1], indirect=True)
def test_a_step_around_ddp_is_refused_with_the_way_out(process_group):
    wrapped = nn.parallel.DistributedDataParallel(network(Greedy()))
    with pytest.raises(TypeError, match="hand the step the network itself, and mesh="):
        LocalStep(wrapped, sgd)


def test_data_parallel_is_refused_with_the_way_out():
    net = network(Greedy())
    replica = net._replicate_for_data_parallel()  # what DataParallel calls on each of several GPUs
    with pytest.raises(RuntimeError, match="no parameters of their own.*DistributedDataParallel"):
        replica(*batch())
    assert replica.eval()(batch()[0]).shape == (6, 10)
    with pytest.raises(TypeError, match="got DataParallel; hand the step the network itself"):
        LocalStep(nn.DataParallel(net), sgd)

"""fuse and fully_shard: what is left because it was sharded first is reported, with the way out, which works."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch.distributed as dist
from saved import saved_maps
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from auglocal_ext import fuse, models
from auglocal_ext.models.transformer import SwiGLU
from auglocal_ext.nn import FusedSequential

ALONE = "is sharded by itself; fuse first, then fully_shard the block around it"
SHARDED = "is sharded; fuse before fully_shard"


@pytest.fixture(autouse=True)
def _one_process() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def shard(*modules: nn.Module) -> None:
    for module in modules:
        fully_shard(module, mesh=init_device_mesh("cpu", (1,)))


class Own(nn.LayerNorm):
    pass


def test_layers_of_transformers() -> None:
    parts = (nn.LayerNorm(8), nn.RMSNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Dropout())
    net = nn.Sequential(*parts, nn.MultiheadAttention(8, 2, batch_first=True), SwiGLU(8, 16), Own(8), nn.Linear(8, 8))
    shard(*list(net)[:-1])
    report = fuse(net)
    assert report.fused == ("6.gate_up (Linear)", "6.down (Linear)", "8 (Linear)")
    assert dict(report.left) == {
        **{str(i): ALONE for i in range(7)},
        "7": "is of type Own, not nn.LayerNorm or nn.RMSNorm",
    }


def test_layers_of_blocks_of_transformers_that_are_sharded_whole_are_fused() -> None:
    net = models.vit(layers=2, width=16, heads=2, patch=4, image_size=8, num_classes=3)
    plain = fuse(copy.deepcopy(net))
    shard(net[1], net[2], net)
    assert fuse(net) == plain and not plain.left


def residual() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    return nn.Sequential(stem, models.BasicBlock(4, 4, 1), nn.Conv2d(4, 4, 1), nn.GroupNorm(2, 4))


def test_blocks_and_chains() -> None:
    net = residual()
    shard(*net, net)
    report = fuse(net)
    assert not report.fused and fuse(net) == report
    assert dict(report.left) == {
        "0": SHARDED,
        "1": SHARDED,
        "3": "is of type GroupNorm, not nn.BatchNorm2d",
    }


def test_a_sharded_network_whose_blocks_are_not() -> None:
    net = residual()
    net.insert(0, nn.BatchNorm2d(3))
    shard(net)
    report = fuse(net)
    assert report.fused == ("1.1, 1.2, 1.3", "2 (BasicBlock)") and type(net[1]) is FusedSequential
    assert dict(report.left) == {"Sequential": SHARDED, "4": "is of type GroupNorm, not nn.BatchNorm2d"}


def test_single_layers_of_convolutional_networks() -> None:
    net = residual()
    net.append(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)))
    shard(*map(net.get_submodule, ("0.3", "1.bn2", "4.2")))
    report = fuse(net)
    assert report.fused == ("0.1, 0.2", "4.0, 4.1")
    assert dict(report.left) == {
        "0.3": ALONE,
        "1": f"its bn2 {ALONE}",
        "3": "is of type GroupNorm, not nn.BatchNorm2d",
        "4.2": ALONE,
    }


def test_what_is_fused_first_stays_fused() -> None:
    torch.manual_seed(0)
    theirs, x = residual()[:2], torch.randn(2, 3, 8, 8)
    ours = copy.deepcopy(theirs)
    report = fuse(ours)
    shard(*ours, ours)
    assert fuse(ours) == report and not report.left
    kept, grads = [], []
    for net in (theirs, ours):
        image = x.clone().requires_grad_()
        kept.append(sum(shape[0] == len(x) for shape in saved_maps(partial(net, x), net)))
        net(image).square().sum().backward()
        grads.append(image.grad)
    assert kept[1] < kept[0]
    torch.testing.assert_close(*grads)

"""A small network under every rule, its batches, and what replicas of it come to, computed in one process."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from auglocal_ext import DGL, MAN, AugLocal, ContSup, Greedy, InfoPro, LocalSequential, PredSim, models

RULES = {
    "auglocal": AugLocal(2),
    "contsup": ContSup("R1E"),
    "dgl": DGL(),
    "greedy": Greedy(),
    "infopro": InfoPro((0.5, 1.0), (1.0, 0.5)),
    "contrast": InfoPro((0.5, 1.0), (1.0, 0.5), loss="contrast"),
    "man": MAN(),
    "predsim": PredSim(),
}
#: Rules whose losses compare samples.
COMPARING = {
    "predsim": PredSim(),
    "predsim alone": PredSim(1.0),
    "contrast": InfoPro((0.5, 1.0), (1.0, 0.5), loss="contrast"),
    "man contrast": MAN(head=InfoPro((0.5, 1.0), (1.0, 0.5), loss="contrast", head=DGL())),
}
STEPS, PART = 4, 4


def mesh(world, device="cpu"):
    return init_device_mesh(device, (world,), mesh_dim_names=("replica",))


def network(rule="auglocal", seed=7, **options):
    torch.manual_seed(seed)
    rule = RULES[rule] if isinstance(rule, str) else rule
    return LocalSequential(models.resnet_cifar(8, width=4), rule, 10, (3, 16, 16), **options).double()


def parts(world, steps=STEPS, sizes=None):
    """For each step the parts of a batch, one per replica."""
    sizes = [PART] * world if sizes is None else sizes
    generator = torch.Generator().manual_seed(11)
    for _ in range(steps):
        x = torch.randn(sum(sizes), 3, 16, 16, generator=generator, dtype=torch.float64)
        y = torch.randint(0, 10, (sum(sizes),), generator=generator)
        yield list(zip(x.split(sizes), y.split(sizes), strict=True))


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-4)


def one_process(net, world, clip_norm=None, accumulate=1, steps=STEPS):
    """The literal meaning: copies of the network take the parts one after another, and all take the mean gradient.

    Buffers are the first copy's.
    """
    copies = [net, *(copy.deepcopy(net) for _ in range(world - 1))]
    optimizers = [sgd(copied.parameters()) for copied in copies]
    for number, batch in enumerate(parts(world, steps * accumulate)):
        for copied, (x, y) in zip(copies, batch, strict=True):
            (copied(x, y).loss / accumulate).backward()
        if (number + 1) % accumulate:
            continue
        for twins in zip(*(copied.parameters() for copied in copies), strict=True):
            if twins[0].grad is not None:
                mean = sum(p.grad for p in twins) / world
                for p in twins:
                    p.grad = mean.clone()
        for copied, optimizer in zip(copies, optimizers, strict=True):
            if clip_norm is not None:
                nn.utils.clip_grad_norm_(copied.parameters(), clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        for copied in copies[1:]:
            for buffer, first in zip(copied.buffers(), net.buffers(), strict=True):
                buffer.copy_(first)
    return net


def everyone_agrees(net):
    """Every parameter and buffer is the same in all processes, to the bit."""
    for name, tensor in net.state_dict().items():
        first = tensor.clone()
        torch.distributed.broadcast(first, 0)
        assert torch.equal(first, tensor), name


def assert_close(net, state):
    for (name, value), theirs in zip(net.state_dict().items(), state.values(), strict=True):
        torch.testing.assert_close(value, theirs, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


def whole_batch(net, world, sizes=None, steps=STEPS):
    """One process that trains on all parts at once."""
    optimizer = sgd(net.parameters())
    for batch in parts(world, steps, sizes):
        net(*(torch.cat(tensors) for tensors in zip(*batch, strict=True))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return net

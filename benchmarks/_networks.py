"""Networks and ways of training them that several benchmarks compare: each is the modules and the loss of a batch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from _backbones import BACKBONES
from _torch_private import unset_fake_temporarily, whole_step_compiles
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from auglocal_ext import AugLocal, Balanced, Greedy, LocalSequential, fuse, models
from auglocal_ext.layers import group_children
from auglocal_ext.local_modules import Recompute
from auglocal_ext.memory.copies import FakeCopy
from auglocal_ext.training.run.networks import cut, task_of

BUDGET = 0.5  # activation_memory_budget of the compiled rival, about where the peak is lowest

Loss = Callable[[Tensor, Tensor], Tensor]


def build(network: str) -> nn.Module:
    """A network by its name (``models.network_by_name``), or a CIFAR ResNet of any depth: ``"resnet1202"``.

    Those of ``BACKBONES`` are ``nn.Sequential``; others of torchvision and timm are what these packages make.
    """
    if network in BACKBONES:
        return BACKBONES[network]()
    depth = _cifar_depth(network)
    if depth is not None:
        return models.resnet_cifar(depth)
    if network in models.NAMES:
        return models.build(network)
    with unset_fake_temporarily() as fake:  # other constructors read values, which fake tensors have not
        net = models.network_by_name(network)
    return net if fake is None else FakeCopy(net).net


def input_shape(network: str) -> tuple[int, int, int]:
    return models.default_input_shape(network) if _cifar_depth(network) is None else (3, 32, 32)


def num_classes(network: str) -> int:
    return models.default_classes(network) if _cifar_depth(network) is None else 10


def _cifar_depth(network: str) -> int | None:
    """The depth in the name of a CIFAR ResNet that ``models`` has no name for."""
    found = re.fullmatch(r"resnet(\d+)", network)
    return int(found[1]) if found and network not in models.NAMES else None


def backpropagation(network: str, fused: bool = False) -> tuple[nn.Module, Loss]:
    net = build(network)
    if fused:
        fuse(net)
    return net, lambda x, y: F.cross_entropy(net(x), y)


def checkpointing(network: str) -> tuple[nn.Module, Loss]:
    """Every child but the classifier keeps its input alone and runs again in the backward pass.

    Of a network that is no ``nn.Sequential`` it is every part between two of its cuts.
    """
    net = build(network)
    if isinstance(net, nn.Sequential):
        *blocks, classifier = net
    else:
        *blocks, classifier = local_of(net, network, Greedy(), None, False).local_modules
    random = any(type(part).__name__ in ("StochasticDepth", "DropPath") for part in net.modules())

    def loss(x: Tensor, y: Tensor) -> Tensor:
        for block in blocks:
            x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=random)
        return F.cross_entropy(classifier(x), y)

    return net, loss


def auglocal(network: str, depth: int, fused: bool, recompute: Recompute = "none") -> tuple[LocalSequential, Loss]:
    """AugLocal as released: pyramid and joint tail for CIFAR, neither for ImageNet."""
    if input_shape(network)[1] == 32:
        rule = AugLocal(depth=depth, pyramid=0.5)
    else:
        head = "vgg" if network.startswith("vgg") else "linear"
        rule = AugLocal(depth=depth, pyramid=0.0, joint_tail=False, single_layer_norm=False, head=head)
    return local(network, rule, None, fused, recompute)


def local(
    network: str, rule: Any, modules: int | Balanced | None, fused: bool, recompute: Recompute = "none"
) -> tuple[LocalSequential, Loss]:
    """The network under a rule, cut into ``modules``, or as many layers as it has; None leaves the cuts to the rule."""
    net = local_of(build(network), network, rule, modules, fused)
    net.recompute = recompute
    return net, lambda x, y: net(x, y).loss


def local_of(net: nn.Module, network: str, rule: Any, modules: int | Balanced | None, fused: bool) -> LocalSequential:
    """``net``, which is ``network``, under a rule, see :func:`local`."""
    task, shape = task_of(network, num_classes(network)), input_shape(network)
    if isinstance(modules, int):
        layers = (
            len(group_children(net)) if isinstance(net, nn.Sequential) else cut(net, Greedy(), task, shape).num_modules
        )
        modules = min(modules, layers)
    return cut(net, rule, task, shape, modules, fused=fused)


@contextlib.contextmanager
def compiling(compiled: bool, budget: float | None = None) -> Iterator[None]:
    """What a row needs around its building and running if it goes through ``torch.compile``; then all is reset.

    ``budget``: torch's ``activation_memory_budget``.
    """
    if not compiled:
        yield
        return
    try:
        with whole_step_compiles(budget):
            yield
    finally:
        torch.compiler.reset()

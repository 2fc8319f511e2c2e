"""Networks and ways of training them that several benchmarks compare: each is the modules and the loss of a batch."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch.nn.functional as F
from _backbones import BACKBONES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from auglocal_ext import AugLocal, LocalSequential, fuse, models
from auglocal_ext.layers import group_children
from auglocal_ext.local_modules import Recompute

BUDGET = 0.5  # activation_memory_budget of the compiled rival, about where the peak is lowest

Loss = Callable[[Tensor, Tensor], Tensor]


def build(network: str) -> nn.Sequential:
    """A network of ``models.NAMES`` or ``BACKBONES``, or a CIFAR ResNet of any depth: ``"resnet1202"``."""
    if network in BACKBONES:
        return BACKBONES[network]()
    depth = _cifar_depth(network)
    return models.build(network) if depth is None else models.resnet_cifar(depth)


def input_shape(network: str) -> tuple[int, int, int]:
    if network in BACKBONES:
        return 3, 224, 224
    return models.input_shape(network) if _cifar_depth(network) is None else (3, 32, 32)


def num_classes(network: str) -> int:
    return 10 if input_shape(network)[1] == 32 else 1000


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
    """Every child but the classifier keeps its input alone and runs again in the backward pass."""
    net = build(network)
    *blocks, classifier = net
    random = any(type(part).__name__ == "StochasticDepth" for part in net.modules())

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
    network: str, rule: Any, modules: int | None, fused: bool, recompute: Recompute = "none"
) -> tuple[LocalSequential, Loss]:
    """The network under a rule, cut into ``modules``, or as many layers as it has; None leaves the cuts to the rule."""
    layers = build(network)
    net = LocalSequential(
        layers,
        rule=rule,
        num_classes=num_classes(network),
        input_shape=input_shape(network),
        modules=None if modules is None else min(modules, len(group_children(layers))),
        fused=fused,
        recompute=recompute,
    )
    return net, lambda x, y: net(x, y).loss


@contextlib.contextmanager
def compiling(compiled: bool, budget: float | None = None) -> Iterator[None]:
    """What a row needs around its building and running if it goes through ``torch.compile``; then all is reset.

    ``budget``: torch's ``activation_memory_budget``.
    """
    if not compiled:
        yield
        return
    import torch._functorch.config

    budgets = {} if budget is None else {"activation_memory_budget": budget}
    try:
        # A backward pass within the compiled function is an error where this is off, as it is by default.
        with torch._dynamo.config.patch(trace_autograd_ops=True), torch._functorch.config.patch(budgets):
            yield
    finally:
        torch.compiler.reset()

"""What ``benchmarks/scale.py`` computes with: FLOPs and bytes of every module, counted on fake tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache, partial
from typing import Any

import torch
from _memory_rows import auglocal
from _networks import local
from _rule_rows import RULES
from _scale_model import Layer, Local
from torch import Tensor, nn

from auglocal_ext import ContSup, Greedy, LocalSequential
from auglocal_ext._torch import FakeTensorMode
from auglocal_ext.auxiliary.base import LossContext
from auglocal_ext.cost import FlopMeter
from auglocal_ext.local_modules import LocalModule, run_forward
from auglocal_ext.memory import MemoryMeter
from auglocal_ext.planning.estimate import StepEstimate

SAMPLE = 64  # images for which backpropagation is counted; all of it grows with the batch
sgd = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
#: Rules that stages can train: MAN reads another stage's parameters.
MAKERS: dict[str, Any] = {name: make for name, (_, make) in RULES.items() if name != "MAN"}
MAKERS |= {"ContSup R1E": lambda network: ContSup("R1E"), "AugLocal d=N": None}


@lru_cache
def fake(network: str, rule: str, modules: int | None) -> tuple[FakeTensorMode, LocalSequential]:
    with FakeTensorMode() as mode:
        return mode, build(network, rule, modules)


def build(network: str, rule: str, modules: int | None) -> LocalSequential:
    """The network under a rule named as in :data:`MAKERS`, cut into ``modules``; None leaves the cuts to the rule."""
    depth = re.fullmatch(r"AugLocal d=(\d+)", rule)
    if depth is None:
        return local(network, MAKERS[rule](network), modules, fused=True)[0]
    net = auglocal(network, int(depth[1]), fused=True)[0]
    return net if modules is None else local(network, net.rule, modules, fused=True)[0]


@lru_cache
def local_modules(network: str, rule: str, modules: int | None, images: int) -> list[Local]:
    """The local modules of the network in a step on so many images."""
    mode, net = fake(network, rule, modules)
    counted = [0]
    with mode, FlopMeter() as meter, torch.no_grad():
        run_forward(net.local_modules, _images(net, images), lambda *_: counted.append(meter.flops))
    estimate = StepEstimate(
        net, images, sgd, params=list(net.parameters()), autocast=None, clip_norm=None, clip="module", accumulate=1
    )
    cost = estimate.cost("none")
    inputs = [module.input for module in cost.modules]
    found = []
    for k, (module, costs) in enumerate(zip(net.local_modules, cost.modules, strict=True)):
        kept = [inputs[i] for i in range(1, k + 1) if i in module.kept]
        sends = inputs[k + 1] + sum(kept) if k + 1 < len(inputs) else 0
        gradients = _averaged(module.parts())
        found.append(Local(costs.flops, counted[k + 1] - counted[k], costs.peak - cost.base, sends, gradients))
    return found


@lru_cache
def layers(network: str) -> list[Layer]:
    """The layers of the network in backpropagation, per image; gradients as they are."""
    with FakeTensorMode():
        net = local(network, Greedy(), 10**6, fused=True)[0]  # as many modules as there are layers
        x, y = _images(net, SAMPLE), net.task.example(SAMPLE)
        h, found = x, []
        for module in net.local_modules:
            h, layer = _layer(module, h.detach().requires_grad_(module.index > 0), LossContext(y, x))
            found.append(layer)
    return found


def _layer(module: LocalModule, h: Tensor, context: LossContext) -> tuple[Tensor, Layer]:
    trained = [p for layer in module.layers for p in layer.parameters()]
    wanted = [*trained, h] if h.requires_grad else trained
    with FlopMeter() as flops, MemoryMeter() as memory:
        memory.track(module.layers, h, context.target)
        before = memory.live_bytes
        out = module(h)
        last = module.auxiliary is None
        end = module.objective(out, context).loss if last else out
        kept, forward, at = memory.live_bytes - before, flops.flops, len(memory.timeline)
        torch.autograd.grad(end, wanted, torch.empty_like(end))
        extra = max(live for _, live in memory.timeline[at:]) - before - kept
    # The gradient of the weights of a convolution or a linear layer takes as many FLOPs as its forward pass.
    inputs = flops.flops - 2 * forward
    sends = 0 if last else out.nbytes
    per_image = (n / SAMPLE for n in (forward, inputs, forward, kept, extra, sends))
    return out, Layer(*per_image, gradients=_averaged(module.layers))


def _images(net: LocalSequential, images: int) -> Tensor:
    return torch.empty(images, *net.network.input_shape)


def _averaged(parts: Iterable[nn.Module]) -> int:
    """Bytes that replicas average: gradients, and BatchNorm's statistics."""
    tensors = [t for part in parts for t in (*part.parameters(), *part.buffers())]
    return sum(t.nbytes for t in tensors if t.is_floating_point())

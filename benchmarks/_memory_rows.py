"""The rows of ``benchmarks/memory.py``: ways of training a network, each as one step of the papers' loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from _networks import BUDGET, Loss, auglocal, backpropagation, build, checkpointing, input_shape, local, num_classes
from torch import Tensor, nn

from auglocal_ext import ContSup, LocalSequential
from auglocal_ext.memory.meter import INPUTS
from auglocal_ext.planning import plan_memory

CONTEXT_MODULES = 16

# Peaks in GB which the AugLocal paper reports at batch 1024, fp32: max_memory_allocated with cuDNN's
# workspaces, for ImageNet summed over its GPUs. The paper does not say which depth; d = 6 (CIFAR) and d = 5
# (ImageNet) fit best.
PAPER = {
    "resnet32": {"BP": 3.15, "AugLocal d=6": 1.67},
    "resnet110": {"BP": 9.27, "BP checkpointing": 3.03, "AugLocal d=6": 1.72},
    "resnet34": {"BP": 42.95, "AugLocal d=5": 29.04},
    "resnet101": {"BP": 157.12, "AugLocal d=5": 97.65},
}
PAPER_BATCH = 1024
EAGER_DEPTHS = (5, 6)  # where the paper's figures stand: d = 6 (CIFAR) and d = 5 (ImageNet)
RECOMPUTED_DEPTHS = (6,)


@dataclass(frozen=True)
class Row:
    """One way of training: ``make(network name)`` returns the modules to train and the loss of a batch.

    ``fused``: whether BatchNorm runs by the fused ops (``LocalSequential(fused=...)``). ``paper``: the name the row has
    in ``PAPER``, where it is the paper's way of working. ``recompute``: that of ``LocalSequential``; "block" for
    checkpointing; or "peak" for what ``plan_memory`` chooses for the batch.
    """

    name: str
    family: str
    make: Callable[[str], tuple[nn.Module, Loss]]
    compiled: bool = False
    budget: float | None = None
    fused: bool = False
    recompute: str = "none"
    paper: str = ""

    def fits(self, network: str) -> bool:
        """Whether the row is one of this network's."""
        return True

    def build_step(self, network: str, batch: int, dtype: str) -> tuple[Callable[..., None], Sequence[Any]]:
        """``(step, tracked)``, as :func:`auglocal_ext.memory.estimate_step` takes them."""
        return build_step(self, network, batch, dtype)


def compiled_backpropagation(network: str) -> tuple[nn.Module, Loss]:
    net = build(network)
    run = torch.compile(net)
    return net, lambda x, y: F.cross_entropy(run(x), y)


def contsup(network: str, context: str, fused: bool) -> tuple[nn.Module, Loss]:
    return local(network, ContSup(context=context, head="1c2f"), CONTEXT_MODULES, fused)


def rows(cuda: bool) -> list[Row]:
    table = [
        Row("BP", "BP", backpropagation, paper="BP"),
        Row("BP fused", "BP", partial(backpropagation, fused=True), fused=True),
        Row("BP checkpointing", "checkpointing", checkpointing, recompute="block", paper="BP checkpointing"),
    ]
    if cuda:
        table.append(Row("BP compile", "compile", compiled_backpropagation, compiled=True))
        name = f"BP compile, budget {BUDGET}"
        table.append(Row(name, "compile", compiled_backpropagation, compiled=True, budget=BUDGET))
    for depth in range(2, 7):
        make, name = partial(auglocal, depth=depth), f"AugLocal d={depth}"
        table.append(Row(name, "AugLocal", partial(make, fused=True), fused=True))
        if depth in RECOMPUTED_DEPTHS:
            lean = partial(make, fused=True, recompute="auxiliary")
            table.append(Row(f"{name} recompute", "AugLocal", lean, fused=True, recompute="auxiliary"))
        if depth in EAGER_DEPTHS:  # as the papers' code works
            table.append(Row(f"{name} eager", "AugLocal", partial(make, fused=False), paper=name))
    for context in ("R0", "R1", "E", "R1E"):
        make, name = partial(contsup, context=context), f"ContSup {context}"
        table.append(Row(name, "ContSup", partial(make, fused=True), fused=True))
    table.append(Row(f"{name} eager", "ContSup", partial(make, fused=False)))
    return table


def _sgd(parameters: Iterable[Tensor]) -> torch.optim.SGD:
    # foreach is what torch chooses on a GPU; said here so that the prediction runs the same optimizer
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=True)


def build_step(row: Row, network: str, batch: int, dtype: str) -> tuple[Callable[..., None], Sequence[Any]]:
    """The papers' loop: gradients to none, loss, backward, one SGD step over everything at the end."""
    net, loss_of = row.make(network)
    half = torch.bfloat16 if dtype == "bf16" else None
    if row.recompute == "peak":
        net = cast("LocalSequential", net)
        net.recompute = plan_memory(net, batch, _sgd, autocast=half, recompute="peak").recompute
    optimizer = _sgd(net.parameters())
    x = torch.randn(batch, *input_shape(network))
    y = torch.randint(0, num_classes(network), (batch,))

    def step(mark: Callable[[str], None]) -> None:
        optimizer.zero_grad(set_to_none=True)
        mark("forward")
        with torch.autocast(x.device.type, dtype=half, enabled=half is not None):
            loss = loss_of(x, y)
        mark("backward")
        loss.backward()
        del loss
        mark("optimizer")
        optimizer.step()

    return step, (net, optimizer, {INPUTS: (x, y)})

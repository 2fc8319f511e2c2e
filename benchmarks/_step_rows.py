"""The rows of ``benchmarks/step.py``: our step with one idea added at a time, and its rivals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from _networks import BUDGET, Loss, auglocal, backpropagation, checkpointing, input_shape, num_classes
from torch import Tensor, nn

from auglocal_ext.memory.meter import INPUTS

DEPTHS = (2, 6)
LR, MOMENTUM = 0.1, 0.9

Mark = Callable[[str], None]


@dataclass(frozen=True)
class Row:
    """One way of training: ``build(row, network, batch)`` makes its step from ``model`` and ``options``.

    ``adds``: what it has that the row before it has not. ``depth``: AugLocal's d. ``half``: bf16 autocast and
    channels-last. ``compiled``: runs through ``torch.compile``, so nothing of it can be predicted. ``cuda_only``: needs
    CUDA streams, without which it would be the same as a row before it.
    """

    name: str
    family: str
    adds: str
    build: Callable[[Row, str, int], Step]
    model: Callable[[str], tuple[nn.Module, Loss]]
    depth: int | None = None
    half: bool = False
    compiled: bool = False
    cuda_only: bool = False
    budget: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> str:
        return "bf16" if self.half else "fp32"


@dataclass
class Step:
    """A built training step on one batch, which ``step(mark)`` repeats, and what lives across its calls.

    ``owner`` is the ``LocalStep`` where there is one.
    """

    run: Callable[[Mark], None]
    net: nn.Module
    optimizer: torch.optim.Optimizer
    batch: tuple[Tensor, Tensor]
    owner: Any = None

    def __call__(self, mark: Mark = lambda label: None) -> None:
        self.run(mark)

    @property
    def tracked(self) -> Sequence[Any]:
        return self.net, self.optimizer, {INPUTS: self.batch}


def rows(depths: Sequence[int] = DEPTHS) -> list[Row]:
    """Every row; a rival's batch, network and optimizer are ours."""
    half = {"half": True}
    compiled = {"build": compiled_step, "model": backpropagation, "compiled": True, **half}
    table = [
        Row("BP", "BP", "backpropagation, one SGD step", late_step, backpropagation),
        Row("BP bf16", "BP", "autocast, channels-last", late_step, backpropagation, **half),
        Row("BP checkpointing", "checkpointing", "per block", late_step, checkpointing),
        Row("BP checkpointing bf16", "checkpointing", "autocast, channels-last", late_step, checkpointing, **half),
        Row("BP compile bf16", "compile", "torch.compile", **compiled),
        Row(f"BP compile bf16, budget {BUDGET}", "compile", "activation_memory_budget", budget=BUDGET, **compiled),
    ]
    for depth in depths:
        table += local_rows(depth)
    return table


def local_rows(depth: int) -> list[Row]:
    """AugLocal at one depth: the released loop, the same compiled, then ours, one idea more in each row."""
    name = f"AugLocal d={depth}"
    eager, fused = partial(auglocal, depth=depth, fused=False), partial(auglocal, depth=depth, fused=True)
    released, whole = f"released loop d={depth}", "torch.compile of the whole pass"
    graph, both = {"graph": "auto", "overlap": False}, {"graph": "auto", "overlap": True}
    table = [
        Row(released, "released", "backward per module, one SGD step", released_step, eager),
        Row(f"{released} bf16", "released", "autocast, channels-last", released_step, eager, half=True),
        Row(f"compiled loop d={depth} bf16", "compile", whole, compiled_local_step, eager, half=True, compiled=True),
        Row(f"{name} eager", "AugLocal", "net(x, y), one SGD step", late_step, eager),
        Row(f"{name} fused", "AugLocal", "fused layers", late_step, fused),
        Row(f"{name} bf16", "AugLocal", "autocast, channels-last", late_step, fused, half=True),
    ]
    for idea, adds, options in (
        ("per-module", "an optimizer step per module", {"graph": False, "overlap": False}),
        ("graph", "one CUDA graph", graph),
        ("peak", 'graph and plan_memory(recompute="peak")', {**graph, "recompute": "peak"}),
        ("overlap", "graph, backward beside the next forward", both),
        ("overlap, peak", "all of it", {**both, "recompute": "peak"}),
    ):
        row = Row(f"{name} {idea}", "AugLocal", adds, owned_step, fused, half=True, options=options)
        table.append(replace(row, cuda_only=options["overlap"]))
    return [replace(row, depth=depth) for row in table]


def late_step(row: Row, network: str, batch: int) -> Step:
    """Loss, backward, one SGD step over everything at the end."""
    net, loss_of = row.model(network)
    net, x, y = prepared(row, net, network, batch)
    optimizer = whole_optimizer(net)

    def run(mark: Mark) -> None:
        optimizer.zero_grad(set_to_none=True)
        mark("forward")
        with precision(row, x):
            loss = loss_of(x, y)
        mark("backward")
        loss.backward()
        del loss
        mark("optimizer")
        optimizer.step()

    return Step(run, net, optimizer, (x, y))


def compiled_step(row: Row, network: str, batch: int) -> Step:
    net, _ = row.model(network)
    compiled = torch.compile(net)
    return late_step(
        replace(row, model=lambda name: (net, lambda x, y: F.cross_entropy(compiled(x), y))), network, batch
    )


def released_step(row: Row, network: str, batch: int) -> Step:
    """The way the paper's code works: a plain head and a backward per module, one SGD step at the end."""
    return _local_loop(row, network, batch, lambda loop: loop, lambda loss, parameters: loss.backward())


def compiled_local_step(row: Row, network: str, batch: int) -> Step:
    """The released loop as one compiled function without a graph break."""

    def backward(loss: Tensor, parameters: list[nn.Parameter]) -> None:
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient

    return _local_loop(row, network, batch, partial(torch.compile, fullgraph=True), backward)


def _local_loop(
    row: Row,
    network: str,
    batch: int,
    wrap: Callable[[Callable[[Tensor, Tensor], Tensor]], Callable[[Tensor, Tensor], Tensor]],
    backward: Callable[[Tensor, list[nn.Parameter]], None],
) -> Step:
    net, _ = row.model(network)
    net, x, y = prepared(row, net, network, batch)
    optimizer = whole_optimizer(net)
    modules = [(module, module.auxiliary, list(module.parameters())) for module in net.local_modules]

    def loop(h: Tensor, target: Tensor) -> Tensor:
        losses = []
        for module, auxiliary, parameters in modules:
            with precision(row, h):
                out = module(h)
                loss = F.cross_entropy(out if auxiliary is None else auxiliary(out), target)
            backward(loss, parameters)
            losses.append(loss.detach())
            h = out.detach()
        return torch.stack(losses)

    loop = wrap(loop)

    def run(mark: Mark) -> None:
        optimizer.zero_grad(set_to_none=True)
        mark("modules")
        loop(x, y)
        mark("optimizer")
        optimizer.step()

    return Step(run, net, optimizer, (x, y))


def owned_step(row: Row, network: str, batch: int) -> Step:
    """``LocalStep`` with the row's options; ``recompute`` may be "peak" or what was planned for each module."""
    from auglocal_ext.planning import plan_memory
    from auglocal_ext.step import LocalStep

    net, _ = row.model(network)
    net, x, y = prepared(row, net, network, batch)
    options = {**row.options, "autocast": torch.bfloat16 if row.half else None}
    recompute = options.pop("recompute", None)
    with torch.device("cpu"):  # a step is built as in a user's program: the tensors are on the GPU, the default is not
        if recompute == "peak":
            overlap = options["overlap"] and x.is_cuda
            options["plan"] = plan_memory(
                net, batch, sgd, autocast=options["autocast"], recompute="peak", overlap=overlap
            )
            options["overlap"] = overlap
        elif recompute is not None:  # a plan made earlier: a choice for each module
            net.recompute = recompute
        owner = LocalStep(net, sgd, **options)

    def run(mark: Mark) -> None:
        mark("modules")
        owner(x, y)

    return Step(run, net, owner.optimizer, (x, y), owner)


def sgd(params: Any) -> torch.optim.SGD:
    return torch.optim.SGD(params, lr=LR, momentum=MOMENTUM)


def whole_optimizer(net: nn.Module) -> torch.optim.Optimizer:
    # foreach is what torch chooses on a GPU; said here so that a prediction runs the same optimizer
    return torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM, foreach=True)


def prepared(row: Row, net: Any, network: str, batch: int) -> tuple[Any, Tensor, Tensor]:
    """The network and a random batch in the row's memory layout, on the default device."""
    x = torch.randn(batch, *input_shape(network))
    y = torch.randint(0, num_classes(network), (batch,))
    if row.half:
        x = x.contiguous(memory_format=torch.channels_last)
        for parameter in net.parameters():  # net.to() asks for data that fake tensors do not have
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return net, x, y


def precision(row: Row, x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=row.half)

"""Balanced cuts: bytes that autograd saves, or FLOPs, of each layer, head and context."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .._torch import storage_id
from ..auxiliary.base import Auxiliary, LossContext
from ..cost import FlopMeter
from ..layers import evaluating
from ..nn import fuse, unfuse
from ..partition import Balance, balance
from .base import Network, Rule, made_like

_BATCH = 2


def saved_bytes(run: Callable[[], Tensor], parameters: frozenset[int]) -> int:
    """Bytes per image that autograd keeps for backward while ``run()`` executes, each storage once.

    Args:
        run: builds a graph on a batch of two.
        parameters: ``id`` of the storages that do not count (``storage_id(tensor.untyped_storage())``).
    """
    storages: dict[int, tuple[int, object]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage_id(storage) not in parameters:
            storages[storage_id(storage)] = (storage.nbytes(), storage)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = run()
    total = sum(size for size, _ in storages.values())
    del kept
    return total // _BATCH


def training_flops(run: Callable[[], Tensor], wanted: Iterable[Tensor]) -> int:
    """FLOPs of ``run()`` and of the gradients of ``wanted`` by its output."""
    with torch.enable_grad(), FlopMeter() as meter:
        out = run()
        trained = [tensor for tensor in wanted if tensor.requires_grad]
        if trained and out.requires_grad:
            torch.autograd.grad(out, trained, torch.ones_like(out), allow_unused=True)
    return meter.flops


def balanced_ends(
    network: Network, rule: Rule, example: Tensor, num_modules: int | None, by: Balance = "memory"
) -> tuple[int, ...]:
    """Module ends with the smallest maximum of saved bytes or FLOPs; see :class:`auglocal_ext.partition.Balanced`.

    Counted is what fused parts keep (:func:`auglocal_ext.nn.fuse`), whether the network is to run fused or not, so that
    the cuts do not depend on it. The network is left unfused.

    Args:
        network: with its layers; its ``ends`` do not matter.
        example: an input ``(1, ...)``.
        num_modules: K.
        by: what is balanced.

    Raises:
        ValueError: without K, and for measured time.
    """
    if num_modules is None:
        raise ValueError("modules=Balanced(...) needs the number of local modules: Balanced(4)")
    if by == "time":
        raise ValueError(
            'Balanced(by="time") is for stages, LocalStep(stage_cuts=...): a layer has no time of its own before it is '
            'part of a local module. Take by="flops" for modules of equal work'
        )
    try:
        costs = (_bytes if by == "memory" else _flops)(network, rule, example)
    finally:
        unfuse(network.primary)
    return balance(len(network.layers), num_modules, costs.layers, costs.heads, costs.contexts)


@dataclass
class _Costs:
    """Of each layer, of the auxiliary network after it, and of the context before it."""

    layers: list[int]
    heads: list[int]
    contexts: list[int]


@dataclass(frozen=True)
class _Layer:
    """A layer, fused, with the auxiliary network of a module that ends here and the context of one that begins."""

    run: nn.Sequential
    head: Auxiliary | None
    context: nn.Module | None


def _layers(network: Network, rule: Rule) -> Iterable[_Layer]:
    finest = replace(network, ends=tuple(range(len(network.layers))))
    children = list(network.primary)
    for layer in network.layers:
        context = head = None
        if layer.index > 0:
            context = made_like(network.primary, partial(rule.build_context, finest, layer.index))
        if layer.index < len(network.layers) - 1:
            head = made_like(network.primary, partial(rule.build_auxiliary, finest, layer.index))
        run = nn.Sequential(*children[layer.start : layer.stop])
        for part in (run, head, context):
            if part is not None:
                fuse(part)
        yield _Layer(run, head, context)


def _batch(example: Tensor) -> Tensor:
    return example.expand(_BATCH, *example.shape[1:]).contiguous()


def _bytes(network: Network, rule: Rule, example: Tensor) -> _Costs:
    costs = _Costs([], [], [])

    def saved(module: nn.Module | None, run: Callable[[], Tensor], shared: list[Tensor]) -> int:
        if module is None:
            return 0
        known = [*module.parameters(), *module.buffers(), *shared]
        return saved_bytes(run, frozenset(storage_id(t.untyped_storage()) for t in known))

    # In eval mode BatchNorm saves the same maps but moves no running statistic.
    with torch.random.fork_rng(devices=[]), evaluating(network.primary):
        inputs: list[Tensor] = []
        h = _batch(example)
        for layer in _layers(network, rule):
            if layer.context is None:
                costs.contexts.append(0)
            else:
                costs.contexts.append(saved(layer.context, partial(layer.context, h, inputs), inputs))
            inputs.append(h)
            costs.layers.append(saved(layer.run, partial(layer.run, h), []))
            h = layer.run(h)
            costs.heads.append(0 if layer.head is None else saved(layer.head, partial(layer.head, h), [h]))
    return costs


def _flops(network: Network, rule: Rule, example: Tensor) -> _Costs:
    """Of a training step on two images, the gradients of inputs included where a module computes them."""
    costs = _Costs([], [], [])
    x, target = _batch(example), network.task.example_for(network.described_input, _BATCH, example.device)
    with torch.random.fork_rng(devices=[]), evaluating(network.primary):
        inputs: list[Tensor] = []
        h = x
        for layer in _layers(network, rule):
            first = not inputs
            alone = training_flops(partial(layer.run, h), layer.run.parameters())
            inside = alone
            if not first:
                source = h.detach().requires_grad_()
                inside = training_flops(partial(layer.run, source), [*layer.run.parameters(), source])
            costs.layers.append(inside)
            if layer.context is None:  # the module's input is detached
                costs.contexts.append(alone - inside)
            else:
                costs.contexts.append(training_flops(partial(layer.context, h, inputs), layer.context.parameters()))
            inputs.append(h)
            with torch.no_grad():
                h = layer.run(h)
            costs.heads.append(0)
            if layer.head is not None:
                output, head = h.detach().requires_grad_(), layer.head
                loss = partial(_loss, head, output, LossContext(target, x))
                costs.heads[-1] = training_flops(loss, [*head.parameters(), output])
    return costs


def _loss(head: Auxiliary, h: Tensor, context: LossContext) -> Tensor:
    return head.loss(h, context).loss

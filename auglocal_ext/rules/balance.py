"""Memory-balanced cuts: bytes that autograd saves for each layer, head and context."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from ..layers import evaluating
from ..nn import fuse, unfuse
from ..partition import balance
from .base import Network, Rule, made_like

_BATCH = 2


def saved_bytes(run: Callable[[], Tensor], parameters: frozenset[int]) -> int:
    """Bytes per image that autograd keeps for backward while ``run()`` executes, each storage once.

    Args:
        run: builds a graph on a batch of two.
        parameters: ``id`` of the storages that do not count (``tensor.untyped_storage()._cdata``).
    """
    storages: dict[int, tuple[int, object]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = (storage.nbytes(), storage)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        kept = run()
    total = sum(size for size, _ in storages.values())
    del kept
    return total // _BATCH


def balanced_ends(network: Network, rule: Rule, example: Tensor, num_modules: int) -> tuple[int, ...]:
    """Module ends with the smallest maximum of saved bytes; see :class:`auglocal_ext.partition.Balanced`.

    Counted is what fused parts keep (:func:`auglocal_ext.nn.fuse`), whether the network is to run fused or not, so that
    the cuts do not depend on it. The network is left unfused.

    Args:
        network: with its layers; its ``ends`` are not looked at.
        example: an input ``(1, ...)``.
    """
    try:
        costs = _costs(network, rule, example)
    finally:
        unfuse(network.primary)
    return balance(len(network.layers), num_modules, *costs)


def _costs(network: Network, rule: Rule, example: Tensor) -> tuple[list[int], list[int], list[int]]:
    """Saved bytes of each layer, of the auxiliary network behind it, and of the context before it."""
    layers = network.layers
    finest = replace(network, ends=tuple(range(len(layers))))
    children = list(network.primary)
    cost: list[int] = []
    head_cost: list[int] = []
    context_cost: list[int] = [0]
    # In eval mode BatchNorm saves the same maps but moves no running statistic.
    with torch.random.fork_rng(devices=[]), evaluating(network.primary):
        inputs: list[Tensor] = []
        h = example.expand(_BATCH, *example.shape[1:]).contiguous()
        for layer in layers:
            if layer.index > 0:
                context = made_like(network.primary, partial(rule.build_context, finest, layer.index))
                if context is not None:
                    fuse(context)
                context_cost.append(0 if context is None else _cost(context, partial(context, h, inputs), inputs))
            inputs.append(h)
            run = nn.Sequential(*children[layer.start : layer.stop])
            fuse(run)
            cost.append(_cost(run, partial(run, h), []))
            head = None
            if layer.index < len(layers) - 1:
                head = made_like(network.primary, partial(rule.build_auxiliary, finest, layer.index))
                fuse(head)
            h = run(h)
            head_cost.append(0 if head is None else _cost(head, partial(head, h), [h]))
    return cost, head_cost, context_cost


def _cost(module: nn.Module, run: Callable[[], Tensor], shared: list[Tensor]) -> int:
    known = [*module.parameters(), *module.buffers(), *shared]
    return saved_bytes(run, frozenset(t.untyped_storage()._cdata for t in known))

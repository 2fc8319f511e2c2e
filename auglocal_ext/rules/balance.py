"""Memory-balanced cuts: bytes that autograd saves for each layer, head and context."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ..nn import fuse, unfuse
from ..partition import Layer, balance, evaluating, probe_input
from .base import Network, Rule

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


def balanced_ends(
    primary: nn.Sequential,
    rule: Rule,
    layers: tuple[Layer, ...],
    input_shape: tuple[int, ...],
    num_classes: int,
    num_modules: int,
    fused: bool = False,
) -> tuple[int, ...]:
    """Module ends with the smallest maximum of saved bytes; see :class:`auglocal_ext.partition.Balanced`.

    ``fused`` counts what is kept by parts that :func:`auglocal_ext.nn.fuse` has changed; it changes ``primary``'s.
    """
    change = fuse if fused else unfuse
    finest = Network(primary, layers, input_shape, num_classes, tuple(range(len(layers))))
    children = list(primary)
    cost: list[int] = []
    head_cost: list[int] = []
    context_cost: list[int] = [0]
    # In eval mode BatchNorm saves the same maps but moves no running statistic.
    with torch.random.fork_rng(devices=[]), evaluating(primary):
        inputs: list[Tensor] = []
        h = probe_input(primary, input_shape, _BATCH)
        for layer in layers:
            if layer.index > 0:
                context = rule.build_context(finest, layer.index)
                if context is not None:
                    change(context)
                context_cost.append(0 if context is None else _cost(context, partial(context, h, inputs), inputs))
            inputs.append(h)
            run = nn.Sequential(*children[layer.start : layer.stop])
            change(run)
            cost.append(_cost(run, partial(run, h), []))
            head = rule.build_auxiliary(finest, layer.index) if layer.index < len(layers) - 1 else None
            if head is not None:
                change(head)
            h = run(h)
            head_cost.append(0 if head is None else _cost(head, partial(head, h), [h]))
    return balance(len(layers), num_modules, cost, head_cost, context_cost)


def _cost(module: nn.Module, run: Callable[[], Tensor], shared: list[Tensor]) -> int:
    known = [*module.parameters(), *module.buffers(), *shared]
    return saved_bytes(run, frozenset(t.untyped_storage()._cdata for t in known))

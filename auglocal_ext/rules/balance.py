"""Memory-balanced cuts: bytes that autograd saves for each layer, head and context, counted on shapes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..partition import Layer, balance, probe_input, shape_only
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
) -> tuple[int, ...]:
    """Module ends with the smallest maximum of saved bytes; see :class:`auglocal_ext.partition.Balanced`."""
    finest = Network(primary, layers, input_shape, num_classes, tuple(range(len(layers))))
    children = list(primary)
    modes = [(part, part.training) for part in primary.modules()]
    cost: list[int] = []
    head_cost: list[int] = []
    context_cost: list[int] = [0]
    with torch.random.fork_rng(devices=[]), shape_only():
        try:
            primary.train()
            inputs: list[Tensor] = []
            h = probe_input(primary, input_shape, _BATCH)
            for layer in layers:
                if layer.index > 0:
                    context = rule.build_context(finest, layer.index)
                    context_cost.append(
                        0 if context is None else _cost(context, lambda c=context, h=h: c(h, inputs), inputs)
                    )
                inputs.append(h)
                run = nn.Sequential(*children[layer.start : layer.stop])
                results: list[Tensor] = []
                cost.append(_cost(run, lambda r=run, h=h, out=results: out.append(r(h)) or out[0], []))
                h = results[0].detach()
                if layer.index < len(layers) - 1:
                    head = rule.build_auxiliary(finest, layer.index)
                    head_cost.append(_cost(head, lambda m=head, h=h: m(h), [h]))
                else:
                    head_cost.append(0)
        finally:
            for part, mode in modes:
                part.training = mode
    return balance(len(layers), num_modules, cost, head_cost, context_cost)


def _cost(module: nn.Module, run: Callable[[], Tensor], shared: list[Tensor]) -> int:
    known = [*module.parameters(), *module.buffers(), *shared]
    return saved_bytes(run, frozenset(t.untyped_storage()._cdata for t in known))

"""The rows of ``benchmarks/memory.py --localized``: local learning of a network beside exact gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from _memory_rows import Loss, Row, auglocal, backpropagation, checkpointing, local
from torch import nn

from auglocal_ext import Balanced, Greedy
from auglocal_ext.local_modules import Recompute

MODULES = 4


def greedy(network: str, modules: Balanced | None, recompute: Recompute = "none") -> tuple[nn.Module, Loss]:
    return local(network, Greedy(), modules, fused=False, recompute=recompute)


def localized_rows() -> list[Row]:
    """Every row runs the network's own layers, as ``localize`` does unless asked for fused ones."""
    four: Callable[..., tuple[nn.Module, Loss]] = partial(greedy, modules=Balanced(MODULES))
    name = f"Greedy K={MODULES}"
    return [
        Row("BP", "BP", backpropagation),
        Row("BP checkpointing", "checkpointing", checkpointing, recompute="block"),
        Row(name, "Greedy", four),
        Row(f"{name} recompute", "Greedy", partial(four, recompute="all"), recompute="all"),
        Row(f"{name} recompute peak", "Greedy", four, recompute="peak"),
        Row("Greedy, every cut", "Greedy", partial(greedy, modules=None)),
        Row("AugLocal d=2, every cut", "AugLocal", partial(auglocal, depth=2, fused=False)),
    ]

"""The linear layer in which a network ends, apart from what is before it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import cast

from torch import nn

from ..nn.fusable import replaced_call
from ..nn.fuse import eager_type
from .groups import is_sequence


def split_readout(layers: Sequence[nn.Module]) -> tuple[tuple[nn.Module, ...], nn.Linear] | None:
    """``layers`` without the linear layer in which they end, and that layer; None where they end otherwise.

    It is looked for at the end of nested ``nn.Sequential``. A linear layer with hooks, a forward of its own or a
    parametrized weight stays where it is, as do containers with hooks: calling it does more than its product.

    Returns:
        Modules to be called one after another, and the layer whose input the last of them makes. They are the
        network's own, in new containers where one was divided.
    """
    if not layers:
        return None
    *before, last = layers
    if replaced_call(last) is not None:
        return None
    if eager_type(last) is nn.Linear:
        return tuple(before), cast("nn.Linear", last)
    if not is_sequence(last):
        return None
    inside = split_readout(list(cast("nn.Sequential", last)))
    if inside is None:
        return None
    parts, linear = inside
    names = list(dict(last.named_children()))
    return (*before, nn.Sequential(OrderedDict(zip(names, parts, strict=False)))), linear

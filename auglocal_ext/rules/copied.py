"""Fresh copies of a network's layers as auxiliary blocks."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from ..auxiliary.adapter import adapter
from ..auxiliary.fresh import FACTORY, fresh_copy
from ..auxiliary.untouched import Untouched
from ..layers import SAY_LAYOUT, Features, evaluating, observe, probe_input
from ..segments import Segment
from .base import Network
from .body import body, features_of, without_tail


def copied_block(network: Network, index: int, features: Features, rule: str) -> tuple[nn.Module, Features]:
    """A fresh copy of layer ``index`` that takes ``features``, and what it puts out: what the layer does.

    Where the layer takes other features in the network, an adapter stands before it. The last layer is copied without
    classifier and pooling.

    Args:
        network: the network.
        index: of the layer.
        features: of the block's input.
        rule: the name of the rule that makes the block, for messages.

    Raises:
        ValueError: where it is unknown which axis of the layer's input or output holds the channels, where no fresh
            copy can be made or no adapter, and for a copy that reaches into the network or puts out another size.
    """
    layer = network.layers[index]
    what = f"layer {index} ({layer.what})"
    if index == 0 and network.input_dtype is not None:
        raise ValueError(f"{rule} cannot repeat {what}: it takes the network's inputs, in {network.input_dtype}")
    taken = taken_by(network, index)
    if taken is None:
        raise ValueError(
            f"{rule} copies {what}, and it is unknown which axis of its input holds the channels: {SAY_LAYOUT}. Or "
            f"pass {FACTORY}"
        )
    if network.task.keeps_positions and features.positions != taken.positions:
        raise ValueError(
            f"{rule} copies {what}, which takes {taken}, after {features}: pooling them would mix positions, and "
            f"{network.task} has an output at each. Choose modules that end where there are as many positions"
        )
    source, made = _source(network, index, rule)
    copied, before = fresh_copy(source, what, network.primary), adapter(features, taken)
    block = copied if before is None else nn.Sequential(OrderedDict(adapter=before, layer=copied))
    template = probe_input(network.primary, features.shape)
    if any(tensor.dtype != template.dtype for tensor in block.parameters()):  # fake tensors refuse it otherwise
        block.to(template.dtype)
    reaches = (
        f"{what} holds a function or an object with parameters or buffers of the network, which a copy of it would "
        f"share. Register them as parameters, buffers and submodules, or pass {FACTORY}"
    )
    with evaluating(block), Untouched(network.primary, reaches):
        shape = tuple(int(size) for size in block(template).shape[1:])
    if shape != made.shape:
        raise ValueError(
            f"a copy of {what} puts out a shape of {shape}, where the layer puts out {made.shape} in the network, so "
            f"that its size depends on more than its input's. Pass {FACTORY}"
        )
    return block, made


def taken_by(network: Network, index: int) -> Features | None:
    """Features of the input of layer ``index``; None where it is unknown which axis holds the channels."""
    return network.input if index == 0 else network.layers[index - 1].features


def _source(network: Network, index: int, rule: str) -> tuple[nn.Module, Features]:
    """What of layer ``index`` is copied, and what it puts out."""
    layer, last = network.layers[index], index == len(network.layers) - 1
    first = network.primary[layer.start]
    segment = first if isinstance(first, Segment) and not first.chained else None
    if segment is not None and any(end is not None and end.crossing for end in (segment.first, segment.last)):
        raise ValueError(
            f"{rule} copies layer {index} ({layer.what}), which takes or hands on more than one tensor: skip "
            f"connections cross its cuts. Choose other modules, or pass {FACTORY}"
        )
    if last and segment is None:
        source, made = body(network, index, rule)
    elif last and segment is not None:
        return _segment_body(network, index, rule, segment)
    elif layer.features is None:
        raise ValueError(
            f"{rule} copies layer {index} ({layer.what}), which puts out a shape of {layer.shape}, and "
            f"{layer.unknown} which axis holds the channels: {SAY_LAYOUT}. Or pass {FACTORY}"
        )
    elif segment is not None:
        return segment, layer.features
    else:
        source, made = nn.Sequential(*network.children_of(layer)), layer.features
    parts = list(source.children())
    return parts[0] if len(parts) == 1 else source, made


def _segment_body(network: Network, index: int, rule: str, segment: Segment) -> tuple[nn.Module, Features]:
    """As :func:`body`, of a layer whose forward is more than its modules, one after another."""
    parts = segment.parts
    with evaluating(*parts):
        handed = observe(parts, probe_input(network.primary, network.layers[index - 1].shape))
    count = without_tail(parts, handed, last=True)
    features = features_of(network, index, rule, parts, handed, count)
    if count == len(parts):
        return segment, features
    return segment.until(parts[count - 1].last), features

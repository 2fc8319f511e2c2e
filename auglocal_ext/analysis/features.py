"""What the layers of a network put out, one at a time.

``layer_outputs`` is a generator. Each layer's output is used before the next layer runs, so memory does not grow with
depth. All analyses accumulate sums over batches, so it does not grow with the data either.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..layers import Features, classifier_start, group_children, observe, probe_input
from ..local_sequential import LocalSequential


def _layers(network: nn.Module) -> nn.Sequential:
    layers = network.network.primary if isinstance(network, LocalSequential) else network
    if not isinstance(layers, nn.Sequential):
        raise TypeError(
            f"network must be a LocalSequential or an nn.Sequential whose children are the layers, got "
            f"{type(network).__name__}; wrap its stages: nn.Sequential(stem, *blocks, classifier)"
        )
    return layers


def _ranges(layers: nn.Sequential) -> list[tuple[int, int]]:
    """Children ``(start, stop)`` of each layer, the classifier by itself."""
    ranges = group_children(layers)
    classifier = classifier_start(layers)
    if classifier < len(layers):
        ranges[-1] = (ranges[-1][0], classifier)
        ranges.append((classifier, len(layers)))
    return ranges


def layer_names(network: nn.Module) -> tuple[str, ...]:
    """A name for each output of :func:`layer_outputs`: that of the layer's first child in its ``nn.Sequential``."""
    layers = _layers(network)
    names = [name for name, _ in layers.named_children()]
    return tuple(names[start] for start, _ in _ranges(layers))


def layer_outputs(network: nn.Module, x: Tensor) -> Iterator[Tensor]:
    """Outputs of the network's layers for inputs ``x`` ``(N, *input_shape)``, in order; the last are the logits.

    What a layer is, :func:`auglocal_ext.layers.group_children` says, except that the classifier (the last child
    with parameters, and what follows it) is a layer of its own here: L + 1 outputs of a network of L layers. Of a
    :class:`auglocal_ext.LocalSequential` they are those of inference: context is supplied, auxiliary networks never
    run. The mode of the network is left as it is.

    An output is to be used before the next is asked for: a layer that works in place may write over its input.

    Raises:
        TypeError: if the network is neither.
    """
    layers = _layers(network)
    children = list(layers)
    supplies = {}
    history: list[Tensor | None] | None = None
    if isinstance(network, LocalSequential) and len(network.context):
        history = []
        first = 0
        for module, end in zip(network.local_modules, network.network.ends, strict=True):
            supplies[network.network.layers[first].start] = module
            first = end + 1
    h = x
    for start, stop in _ranges(layers):
        if start in supplies:
            h = supplies[start].supply(h, history)
        for child in children[start:stop]:
            h = child(h)
        yield h


def layer_features(network: nn.Module, input_shape: tuple[int, ...]) -> tuple[Features, ...]:
    """What the layers put out, described, by an input of zeros; the network is to be in eval mode.

    Raises:
        ValueError: where neither the layers nor ``LocalSequential(layout=...)`` tell which axis holds the channels.
    """
    layers = _layers(network)
    wrapped = network.network if isinstance(network, LocalSequential) else None
    dtype = None if wrapped is None else wrapped.input_dtype
    with torch.no_grad():
        handed = observe(list(layers), probe_input(layers, input_shape, 1, dtype))
    found = []
    for index, (name, (_, stop)) in enumerate(zip(layer_names(network), _ranges(layers), strict=True)):
        said = wrapped.layers[index].layout if wrapped is not None and index < len(wrapped.layers) else None
        features = handed[stop].features(said)
        if features is None:
            raise ValueError(
                f"{handed[stop].why_unknown} which axis of layer {name}'s output {handed[stop].shape} holds the "
                "channels: wrap the network with layout="
            )
        found.append(features)
    return tuple(found)

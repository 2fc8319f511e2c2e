"""What the layers of a network put out, one at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ..local_sequential import LocalSequential
from ..partition import classifier_start, group_children


def _layers(network: nn.Module) -> nn.Sequential:
    layers = network.primary if isinstance(network, LocalSequential) else network
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

    What a layer is, :func:`auglocal_ext.partition.group_children` says, except that the classifier (the last child
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


def layer_shapes(network: nn.Module, input_shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Shapes of the layers' outputs without the batch dimension, by two images of zeros; call it in eval mode."""
    parameter = next(network.parameters())
    x = torch.zeros(2, *input_shape, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad():
        return tuple(tuple(h.shape[1:]) for h in layer_outputs(network, x))

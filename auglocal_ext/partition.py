"""Where a network is cut: from an ``nn.Sequential`` to layers, from layers to local modules."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .nn import eager_type

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LocalResponseNorm,
)


@dataclass(frozen=True)
class Layer:
    """One layer of the network: a run of children of the user's ``nn.Sequential``.

    Attributes:
        index: position among the layers, from 0; the stem counts as one.
        start, stop: its children are ``layers[start:stop]``.
        kind: ``"basic"`` or ``"bottleneck"`` (residual blocks), ``"conv"``, ``"linear"``, else a type name.
        block: the submodule an auxiliary block is modelled on (residual block, convolution or linear layer).
        shape: shape of its output without the batch dimension, ``(C, H, W)`` or ``(features,)``.
        width: base width: output channels, for a bottleneck divided by its expansion.
    """

    index: int
    start: int
    stop: int
    kind: str
    block: Any
    shape: tuple[int, ...]
    width: int


def _has_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _first_children(layers: nn.Sequential) -> list[int]:
    """Positions of the children that start a layer, then that of the classifier if it is a child of its own."""
    if not isinstance(layers, nn.Sequential):
        raise TypeError(
            f"layers must be an nn.Sequential whose children are the layers, got {type(layers).__name__}; "
            "wrap the network's stages: nn.Sequential(stem, *blocks, classifier)"
        )
    starts = [i for i, c in enumerate(layers) if _has_parameters(c) and not isinstance(c, _NORMS)]
    if not starts:
        raise ValueError("layers has no child with parameters, so there is nothing to train")
    return starts


def group_children(layers: nn.Sequential) -> list[tuple[int, int]]:
    """Ranges ``(start, stop)`` of children that form one layer each.

    A child with parameters starts a layer. Children without parameters (activation, pooling, flatten, dropout)
    and normalisation layers join the layer before them, leading ones the first layer. The last child with
    parameters is the network's classifier and belongs, with what surrounds it, to the last layer.

    Raises:
        TypeError: if ``layers`` is no ``nn.Sequential``.
        ValueError: if no child has parameters.
    """
    starts = _first_children(layers)
    starts = starts[:-1] or starts
    starts[0] = 0
    return list(zip(starts, [*starts[1:], len(layers)], strict=True))


def classifier_start(layers: nn.Sequential) -> int:
    """Position of the child with which the network's classifier starts: the last one with parameters.

    ``len(layers)`` where one layer is all there is. Raises as :func:`group_children`.
    """
    starts = _first_children(layers)
    return starts[-1] if len(starts) > 1 else len(layers)


def leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Submodules through nested ``nn.Sequential`` only: other containers are opaque."""
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from leaves(child)
    else:
        yield module


def _classify(children: Sequence[nn.Module]) -> tuple[str, nn.Module]:
    parts = [leaf for child in children for leaf in leaves(child)]
    for leaf in parts:
        name = eager_type(leaf).__name__
        if name in ("BasicBlock", "Bottleneck") and hasattr(leaf, "conv2") and hasattr(leaf, "bn2"):
            return {"BasicBlock": "basic", "Bottleneck": "bottleneck"}[name], leaf
    weighted = [leaf for leaf in parts if _has_parameters(leaf) and not isinstance(leaf, _NORMS)]
    if not weighted:
        return type(parts[0]).__name__ if parts else "empty", children[0]
    convs = [leaf for leaf in weighted if isinstance(leaf, nn.Conv2d)]
    if len(convs) == len(weighted) == 1:
        return "conv", convs[0]
    if len(weighted) == 1 and isinstance(weighted[0], nn.Linear):
        return "linear", weighted[0]
    return type(weighted[0]).__name__, weighted[0]


def _output_width(layer_kind: str, block: Any, channels: int) -> int:
    # The classifier belongs to the last layer, whose width is therefore read from the block, not from the output.
    if layer_kind == "basic":
        return block.conv2.out_channels
    if layer_kind == "bottleneck":
        return block.conv3.out_channels // type(block).expansion
    if layer_kind == "conv":
        return block.out_channels
    if layer_kind == "linear":
        return block.out_features
    return channels


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Within the context every submodule is in eval mode and no gradient is recorded; modes are restored after."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def probe_input(module: nn.Module, shape: Sequence[int], batch: int = 1) -> Tensor:
    """Zeros ``(batch, *shape)`` on the device and in the dtype of the module's first parameter."""
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    if parameter is None:
        return torch.zeros(batch, *shape)
    return torch.zeros(batch, *shape, device=parameter.device, dtype=parameter.dtype)


def describe(layers: nn.Sequential, input_shape: Sequence[int], num_classes: int) -> tuple[Layer, ...]:
    """The layers of a network with kinds, output shapes and widths, found by a pass of one image of zeros in eval mode.

    Neither the weights nor BatchNorm's running statistics nor the random state are touched.

    Raises:
        ValueError: if the network does not accept ``(N, *input_shape)`` or does not end in
            ``(N, num_classes)``.
    """
    ranges = group_children(layers)
    children = list(layers)
    classifier = classifier_start(layers)
    described = []
    with evaluating(layers):
        h = probe_input(layers, input_shape)
        for index, (start, stop) in enumerate(ranges):
            channels = None
            for position in range(start, stop):
                try:
                    h = children[position](h)
                except Exception as error:
                    raise ValueError(
                        f"layers[{position}] ({type(children[position]).__name__}) does not accept an input of shape "
                        f"(N, {', '.join(map(str, h.shape[1:]))}), which is what input_shape={tuple(input_shape)} "
                        f"leads to; pass the shape of one input without the batch dimension. torch says: {error}"
                    ) from error
                if not isinstance(h, Tensor):
                    raise ValueError(
                        f"layers[{position}] ({type(children[position]).__name__}) returns {type(h).__name__}; "
                        "each layer must map one tensor to one tensor"
                    )
                if channels is None and _has_parameters(children[position]):
                    channels = int(h.shape[1])
            kind, block = _classify(children[start : min(stop, classifier)])
            shape = tuple(int(s) for s in h.shape[1:])
            width = _output_width(kind, block, shape[0] if channels is None else channels)
            described.append(Layer(index, start, stop, kind, block, shape, width))
    if described[-1].shape != (num_classes,):
        raise ValueError(
            f"the network's output has shape (N, {', '.join(map(str, described[-1].shape))}), expected "
            f"(N, num_classes) = (N, {num_classes}); the last child must be the classifier (pool, flatten, linear)"
        )
    return tuple(described)


def equal_sizes(num_layers: int, num_modules: int) -> list[int]:
    """Numbers of layers per module, contiguous and as equal as possible.

    With a remainder of one the first module takes the extra layer (the stem); with any other remainder the last
    modules take one more each. This is the partition of InfoPro's and ContSup's released configurations:
    ResNet-32 (16 layers) K = 3 gives 6, 5, 5; ResNet-110 (55 layers) K = 4 gives 13, 14, 14, 14.
    """
    size, extra = divmod(num_layers, num_modules)
    sizes = [size] * num_modules
    if extra == 1:
        sizes[0] += 1
    else:
        for k in range(num_modules - extra, num_modules):
            sizes[k] += 1
    return sizes


def cut_points(num_layers: int, modules: int | Sequence[int] | None) -> tuple[int, ...]:
    """Indices of the last layer of each local module, ascending, ending in ``num_layers - 1``.

    Args:
        num_layers: L, the number of layers.
        modules: None for one module per layer; K for K contiguous modules of equal counts
            (:func:`equal_sizes`); or explicit cut points: the layer index with which each module but the last
            ends, ascending, e.g. ``[2, 6]`` for layers 0..2, 3..6, 7..L-1.

    Raises:
        TypeError: if ``modules`` is none of these.
        ValueError: if K is below 1 or above L, or cut points are not ascending within ``0 .. L-2``.
    """
    if modules is None:
        return tuple(range(num_layers))
    if isinstance(modules, Sequence) and not isinstance(modules, str | bytes):
        cuts = [operator.index(c) for c in modules]
        if any(b <= a for a, b in zip(cuts, cuts[1:], strict=False)) or any(c < 0 or c > num_layers - 2 for c in cuts):
            raise ValueError(
                f"cut points are the index of the last layer of each module but the last, ascending within 0 .. "
                f"{num_layers - 2} for this network of {num_layers} layers; got {list(modules)}"
            )
        return (*cuts, num_layers - 1)
    try:
        count = operator.index(cast(int, modules))
    except TypeError:
        raise TypeError(
            f"modules must be None (one per layer), a number of modules or a sequence of cut points, "
            f"got {type(modules).__name__}"
        ) from None
    if not 1 <= count <= num_layers:
        raise ValueError(
            f"modules={count} local modules asked for, but the network has {num_layers} layers; "
            f"choose 1 .. {num_layers}"
        )
    ends, last = [], -1
    for size in equal_sizes(num_layers, count):
        last += size
        ends.append(last)
    return tuple(ends)


#: Cut points of the "memory balance" partitions in ContSup's released configuration for CIFAR-10, by
#: (number of layers, number of modules): 16 layers is ResNet-32, 55 layers ResNet-110.
CONTSUP_BALANCED: dict[tuple[int, int], tuple[int, ...]] = {
    (16, 2): (4,),
    (16, 4): (3, 5, 8),
    (16, 8): (2, 3, 4, 7, 8, 12, 13),
    (55, 2): (15,),
    (55, 3): (10, 21),
    (55, 4): (7, 15, 27),
}


@dataclass(frozen=True)
class Balanced:
    """``modules=Balanced(K)``: K local modules cut so that the largest module's saved activations are smallest.

    The bytes that autograd saves for each layer, head and context encoder are counted on two images of zeros when the
    wrapper is built; a module's cost is the sum over its layers, its head and its context.
    """

    modules: int


def balance(
    num_layers: int,
    num_modules: int,
    cost: Sequence[int],
    head_cost: Sequence[int],
    context_cost: Sequence[int],
) -> tuple[int, ...]:
    """Ends of the contiguous partition with the smallest maximum module cost (dynamic programme, O(K L^2)).

    Args:
        cost: bytes of each layer, length L.
        head_cost: bytes of the auxiliary network of a module that ends in layer i (0 for the last layer).
        context_cost: bytes of the context encoders of a module that starts with layer i (0 for the first).

    Returns:
        Index of the last layer of each module, as :func:`cut_points`.
    """
    if not 1 <= num_modules <= num_layers:
        raise ValueError(f"{num_modules} modules asked for, but the network has {num_layers} layers")
    prefix = [0]
    for value in cost:
        prefix.append(prefix[-1] + value)

    def module_cost(first: int, last: int) -> int:
        return prefix[last + 1] - prefix[first] + head_cost[last] + context_cost[first]

    # best[j] = (smallest maximum, start of the last module) for layers 0..j cut into the current number of modules
    best = [(module_cost(0, j), 0) for j in range(num_layers)]
    history = [best]
    for count in range(2, num_modules + 1):
        step: list[tuple[int, int]] = []
        for j in range(num_layers):
            options = [(max(best[i - 1][0], module_cost(i, j)), i) for i in range(count - 1, j + 1) if i >= 1]
            step.append(min(options) if options else (sum(cost) + sum(head_cost) + sum(context_cost) + 1, 0))
        best = step
        history.append(best)
    ends, j = [], num_layers - 1
    for table in reversed(history):
        ends.append(j)
        j = table[j][1] - 1
    return tuple(reversed(ends))

"""Fresh blocks for auxiliary networks, modelled on a layer of the primary network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

from torch import nn

from ..models.blocks import BasicBlock, Bottleneck, initialise
from ..partition import Layer, leaves

#: ``factory(in_channels, out_channels, stride, layer)`` returns a module that maps ``(N, in_channels, H, W)`` to
#: ``(N, out_channels, H/stride, W/stride)``; ``layer`` is the sampled layer of the primary network.
BlockFactory = Callable[[int, int, int, nn.Module], nn.Module]


def output_channels(layer: Layer) -> int:
    """Channels (or features) a block modelled on ``layer`` puts out."""
    if layer.kind == "bottleneck":
        return layer.block.conv3.out_channels
    return layer.width


def _conv_block(
    children: list[nn.Module], source: nn.Conv2d, in_channels: int, out_channels: int, pool: bool
) -> nn.Sequential:
    """Convolution with the sampled layer's kernel, stride 1, and its normalisation and activation, fresh."""
    kernel, dilation = (cast("tuple[int, int]", size) for size in (source.kernel_size, source.dilation))
    if any(k % 2 == 0 for k in kernel):
        raise ValueError(
            f"an auxiliary block keeps the size of its map, which a convolution of kernel {kernel} cannot with equal "
            "padding; pass AugLocal(block=factory) with a factory(in_channels, out_channels, stride, layer)"
        )
    parts: list[nn.Module] = [nn.MaxPool2d(2)] if pool else []
    parts.append(
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            padding=(kernel[0] // 2 * dilation[0], kernel[1] // 2 * dilation[1]),
            dilation=dilation,
            bias=source.bias is not None,
        )
    )
    found_activation = False
    for child in children:
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            parts.append(nn.BatchNorm2d(out_channels, eps=child.eps, momentum=child.momentum))
        elif isinstance(child, nn.GroupNorm):
            parts.append(nn.GroupNorm(child.num_groups, out_channels, eps=child.eps))
        elif type(child).__module__.endswith("modules.activation") and not any(True for _ in child.parameters()):
            parts.append(copy.deepcopy(child))
            found_activation = True
            break
    if not found_activation:
        parts.append(nn.ReLU(inplace=True))
    return nn.Sequential(*parts)


def _linear_block(children: list[nn.Module], source: nn.Linear, in_features: int, out_features: int) -> nn.Sequential:
    parts: list[nn.Module] = [nn.Linear(in_features, out_features, bias=source.bias is not None)]
    for child in children:
        if isinstance(child, nn.BatchNorm1d):
            parts.append(nn.BatchNorm1d(out_features, eps=child.eps, momentum=child.momentum))
        elif type(child).__module__.endswith("modules.activation") and not any(True for _ in child.parameters()):
            parts.append(copy.deepcopy(child))
            break
    else:
        parts.append(nn.ReLU(inplace=True))
    return nn.Sequential(*parts)


def _after(children: list[nn.Module], source: nn.Module) -> list[nn.Module]:
    """Leaf modules that follow ``source`` in the layer, up to the next convolution or linear layer."""
    parts = [leaf for child in children for leaf in leaves(child)]
    following = []
    for leaf in parts[next(i for i, part in enumerate(parts) if part is source) + 1 :]:
        if isinstance(leaf, nn.Conv2d | nn.Linear):
            break
        following.append(leaf)
    return following


def make_block(
    layer: Layer,
    children: list[nn.Module],
    in_channels: int,
    stride: int,
    factory: BlockFactory | None = None,
    width: int | None = None,
) -> nn.Module:
    """A fresh, independently initialised block of the kind of ``layer``; only its width is taken over.

    Args:
        layer: the layer it is modelled on.
        children: its children in the user's network.
        in_channels: channels of the map the block is fed.
        stride: inferred stride. A ``conv`` block realises stride 2 as a 2x2 max pooling in front.
        factory: makes the block instead, for kinds not known here.
        width: base width of the block, if not the layer's.

    Raises:
        ValueError: if no block can be made of the layer's kind and there is no factory.
    """
    width = layer.width if width is None else width
    out_channels = output_channels(layer) * width // layer.width
    if factory is not None:
        source = children[0] if len(children) == 1 else nn.Sequential(*children)
        return factory(in_channels, out_channels, stride, source)
    block = layer.block
    if layer.kind == "basic":
        return BasicBlock(in_channels, out_channels, stride)
    if layer.kind == "bottleneck":
        return Bottleneck(
            in_channels,
            out_channels,
            stride,
            block.conv2.out_channels * width // layer.width,
            block.conv2.groups,
        )
    if layer.kind == "conv":
        made = _conv_block(_after(children, block), block, in_channels, out_channels, stride == 2)
        initialise(made)
        return made
    if layer.kind == "linear":
        return _linear_block(_after(children, block), block, in_channels, out_channels)
    raise ValueError(
        f"layer {layer.index} is a {layer.kind}, of which no auxiliary block can be made; known are BasicBlock, "
        "Bottleneck, convolution and linear layers. Pass AugLocal(block=factory) with a "
        "factory(in_channels, out_channels, stride, layer) that returns an nn.Module"
    )

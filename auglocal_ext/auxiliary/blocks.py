"""Fresh blocks for auxiliary networks, modelled on a layer of the primary network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

from ..layers import Layer, Residual, has_parameters, leaves
from ..models.blocks import BasicBlock, Bottleneck, initialise
from .fresh import FACTORY

#: ``factory(in_channels, out_channels, stride, layer)`` returns a module that maps ``(N, in_channels, H, W)`` to
#: ``(N, out_channels, H/stride, W/stride)``, or features of another layout to features of that layout; ``layer`` is the
#: sampled layer of the primary network.
BlockFactory = Callable[[int, int, int, nn.Module], nn.Module]

_ACTIVATIONS = nn.modules.activation.__name__
#: Where torch's layers are that an auxiliary block leaves out.
_LEFT_OUT = tuple(
    f"torch.nn.modules.{name}" for name in ("dropout", "pooling", "flatten", "linear", "padding", "upsampling")
)


def _conv_block(
    layer: Layer, children: list[nn.Module], in_channels: int, out_channels: int, pool: bool, as_torch: bool
) -> nn.Module:
    """Convolution with the sampled layer's kernel, stride 1, and its normalisation and activation, fresh."""
    source = cast("nn.Conv2d", layer.block)
    kernel, dilation = (cast("tuple[int, int]", size) for size in (source.kernel_size, source.dilation))
    parts: list[nn.Module] = [nn.MaxPool2d(2)] if pool else []
    parts.append(
        nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            padding=(kernel[0] // 2 * dilation[0], kernel[1] // 2 * dilation[1]),
            dilation=dilation,
            bias=source.bias is not None,
            padding_mode=source.padding_mode,
        )
    )
    made = nn.Sequential(*parts, *_rest(layer, children, out_channels))
    if not as_torch:
        initialise(made)
    return made


def _linear_block(layer: Layer, children: list[nn.Module], in_features: int, out_features: int) -> nn.Module:
    source = cast("nn.Linear", layer.block)
    linear = nn.Linear(in_features, out_features, bias=source.bias is not None)
    return nn.Sequential(linear, *_rest(layer, children, out_features))


def _rest(layer: Layer, children: list[nn.Module], width: int) -> list[nn.Module]:
    """Normalisation and activation as the sampled layer has them, fresh; ReLU where it has none.

    Dropout, pooling and what follows the activation are left out.
    """
    parts: list[nn.Module] = []
    for leaf in _after(children, cast("nn.Module", layer.block)):
        made = fresh_norm(leaf, width)
        if made is not None:
            parts.append(made)
        elif isinstance(leaf, nn.PReLU):
            count, value = (width if leaf.num_parameters > 1 else 1), leaf.init
            return [*parts, nn.PReLU(count, value)]
        elif _is_activation(leaf):
            return [*parts, copy.deepcopy(leaf)]
    return [*parts, nn.ReLU(inplace=True)]


def _is_activation(leaf: nn.Module) -> bool:
    return type(leaf).__module__ == _ACTIVATIONS and not has_parameters(leaf)


def fresh_norm(leaf: nn.Module, width: int) -> nn.Module | None:
    """A fresh normalisation of the kind of ``leaf``, for ``width`` channels; None where it is none that is known."""
    if isinstance(leaf, nn.BatchNorm2d | nn.BatchNorm1d):
        kind = nn.BatchNorm2d if isinstance(leaf, nn.BatchNorm2d) else nn.BatchNorm1d
        return kind(width, leaf.eps, leaf.momentum, leaf.affine, leaf.track_running_stats)
    if isinstance(leaf, nn.GroupNorm):
        return nn.GroupNorm(leaf.num_groups, width, leaf.eps, leaf.affine)
    if type(leaf) is nn.InstanceNorm2d:
        momentum = cast("float", leaf.momentum)
        return nn.InstanceNorm2d(width, leaf.eps, momentum, leaf.affine, leaf.track_running_stats)
    if type(leaf) is nn.LayerNorm and len(leaf.normalized_shape) == 1:
        return nn.LayerNorm(width, leaf.eps, leaf.elementwise_affine, bias=leaf.bias is not None)
    if type(leaf) is nn.RMSNorm and len(leaf.normalized_shape) == 1:
        return nn.RMSNorm(width, leaf.eps, leaf.elementwise_affine)
    return copy.deepcopy(leaf) if type(leaf) is nn.LocalResponseNorm else None


def _after(children: list[nn.Module], source: nn.Module) -> list[nn.Module]:
    """Leaf modules that follow ``source`` in the layer, up to the next convolution or linear layer."""
    parts = [leaf for child in children for leaf in leaves(child)]
    following = []
    for leaf in parts[next(i for i, part in enumerate(parts) if part is source) + 1 :]:
        if isinstance(leaf, nn.Conv2d | nn.Linear):
            break
        following.append(leaf)
    return following


def why_unknown(layer: Layer, children: list[nn.Module]) -> str:
    """Why :func:`make_block` can make no block of a layer's kind, in words for messages; empty where it can."""
    if layer.kind == "other":
        return (
            f"is {layer.what}: known are layers of one residual block (two 3x3 convolutions, or 1x1, 3x3, 1x1, each "
            "with BatchNorm, and ReLU), one convolution or one linear layer"
        )
    source = layer.block
    if isinstance(source, nn.Conv2d):
        if any(size % 2 == 0 for size in source.kernel_size):
            return f"is a convolution of kernel {source.kernel_size}, which cannot keep the size of a map"
        if source.groups > 1:
            return f"is a convolution in {source.groups} groups"
    if isinstance(source, nn.Conv2d | nn.Linear):
        if all(leaf is not source for child in children for leaf in leaves(child)):
            return f"holds its {type(source).__name__} in a module with a forward of its own"
        for leaf in _after(children, source):
            if isinstance(leaf, nn.PReLU) or _is_activation(leaf):
                break
            with torch.device("meta"):
                known = fresh_norm(leaf, layer.width) is not None
            if not known and not type(leaf).__module__.startswith(_LEFT_OUT):
                return f"holds a {type(leaf).__name__}"
    return ""


def make_block(
    layer: Layer,
    children: list[nn.Module],
    in_channels: int,
    stride: int,
    factory: BlockFactory | None = None,
    width: int | None = None,
    as_torch: bool = False,
) -> nn.Module:
    """A fresh, independently initialised block of the kind of ``layer``; only its width is taken over.

    Args:
        layer: the layer it is modelled on.
        children: its children in the user's network.
        in_channels: channels of the block's input.
        stride: inferred stride. A ``conv`` block realises stride 2 as a 2x2 max pooling in front.
        factory: makes the block instead, for kinds not known here.
        width: base width of the block, if not the layer's.
        as_torch: leave the convolution of a ``conv`` block as torch initialises it.

    Raises:
        ValueError: if no block can be made of the layer's kind and there is no factory.
    """
    width = layer.width if width is None else width
    out_channels = layer.out_channels * width // layer.width
    if factory is not None:
        source = children[0] if len(children) == 1 else nn.Sequential(*children)
        return factory(in_channels, out_channels, stride, source)
    block = layer.block
    why = why_unknown(layer, children)
    if why:
        raise ValueError(
            f"layer {layer.index} {why}, so that no auxiliary block of its kind can be made. Pass {FACTORY}"
        )
    if isinstance(block, Residual):
        made: nn.Module
        if layer.kind == "basic":
            made = BasicBlock(in_channels, out_channels, stride)
        else:
            mid_channels = block.mid_channels * width // layer.width
            made = Bottleneck(in_channels, out_channels, stride, mid_channels, block.groups)
        for part in made.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eps, part.momentum = block.eps, block.momentum
        return made
    if layer.kind == "conv":
        return _conv_block(layer, children, in_channels, out_channels, stride == 2, as_torch)
    return _linear_block(layer, children, in_channels, out_channels)

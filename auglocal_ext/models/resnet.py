"""Residual networks for CIFAR (6n + 2 layers) and ImageNet, as ``nn.Sequential`` of their layers."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .blocks import BasicBlock, Bottleneck, conv_bn_relu


def _classifier(width: int, num_classes: int) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(width, num_classes))
    )


def resnet_cifar(depth: int, num_classes: int = 10, width: int = 16) -> nn.Sequential:
    """CIFAR ResNet of ``depth = 6n + 2`` layers: a stem and three stages of n BasicBlocks.

    Children: ``stem`` (3x3 convolution, BatchNorm, ReLU), ``layer1_0`` ... ``layer3_{n-1}``, ``classifier``
    (global average pool, flatten, ``fc``); 3n + 1 local layers. Widths are ``width``, ``width``, 2 and 4 times
    ``width``; ResNet-32 has 466 906 parameters. Input ``(N, 3, H, W)``, output logits ``(N, num_classes)``.

    Args:
        depth: 6n + 2 with n >= 1.
        num_classes: outputs.
        width: width of the first stage.

    Raises:
        ValueError: if ``depth`` is not 6n + 2 with n >= 1, or ``width`` or ``num_classes`` is below 1.

    Source: He et al. 2016, section 4.2, with 1x1-convolution shortcuts as in the code of AugLocal and ContSup.
    """
    if depth < 8 or (depth - 2) % 6:
        raise ValueError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20, 26, 32, ..., 110), got {depth}")
    if width < 1 or num_classes < 1:
        raise ValueError(f"width and num_classes are at least 1, got {width} and {num_classes}")
    blocks = (depth - 2) // 6
    parts: OrderedDict[str, nn.Module] = OrderedDict(stem=conv_bn_relu(3, width))
    channels = width
    for stage in range(3):
        out = width * 2**stage
        for block in range(blocks):
            stride = 2 if stage > 0 and block == 0 else 1
            parts[f"layer{stage + 1}_{block}"] = BasicBlock(channels, out, stride)
            channels = out
    parts["classifier"] = _classifier(channels, num_classes)
    return nn.Sequential(parts)


def _resnet_imagenet(
    block: type[BasicBlock] | type[Bottleneck], counts: tuple[int, ...], num_classes: int
) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        stem=conv_bn_relu(3, 64, kernel_size=7, stride=2, max_pool_after=True)
    )
    channels = 64
    expansion = Bottleneck.expansion if block is Bottleneck else 1
    for stage, count in enumerate(counts):
        out = 64 * 2**stage * expansion
        for i in range(count):
            stride = 2 if stage > 0 and i == 0 else 1
            parts[f"layer{stage + 1}_{i}"] = block(channels, out, stride)
            channels = out
    parts["classifier"] = _classifier(channels, num_classes)
    return nn.Sequential(parts)


def resnet18(num_classes: int = 1000) -> nn.Sequential:
    """ImageNet ResNet-18: stem with max pooling, 8 BasicBlocks, 9 local layers; ``(N, 3, 224, 224)``."""
    return _resnet_imagenet(BasicBlock, (2, 2, 2, 2), num_classes)


def resnet34(num_classes: int = 1000) -> nn.Sequential:
    """ImageNet ResNet-34: stem with max pooling, 16 BasicBlocks, 17 local layers; ``(N, 3, 224, 224)``."""
    return _resnet_imagenet(BasicBlock, (3, 4, 6, 3), num_classes)


def resnet50(num_classes: int = 1000) -> nn.Sequential:
    """ImageNet ResNet-50: stem with max pooling, 16 Bottlenecks, 17 local layers; ``(N, 3, 224, 224)``."""
    return _resnet_imagenet(Bottleneck, (3, 4, 6, 3), num_classes)


def resnet101(num_classes: int = 1000) -> nn.Sequential:
    """ImageNet ResNet-101: stem with max pooling, 33 Bottlenecks, 34 local layers; ``(N, 3, 224, 224)``."""
    return _resnet_imagenet(Bottleneck, (3, 4, 23, 3), num_classes)

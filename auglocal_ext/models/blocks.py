"""Residual blocks and convolution layers of which the networks and the auxiliary networks are made."""

from __future__ import annotations

import math
from collections import OrderedDict

from torch import Tensor, nn


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """3x3 convolution without bias, padding 1: ``(N, in_channels, H, W) -> (N, out_channels, H/stride, W/stride)``."""
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, groups=groups, bias=False)


def _shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


class BasicBlock(nn.Module):
    """``relu(bn(conv3x3(relu(bn(conv3x3(x))))) + shortcut(x))``.

    The shortcut is the identity, or a 1x1 convolution with BatchNorm where stride or width change. Submodules
    have torchvision's names, so a block's state dict is interchangeable with that of torchvision's block.

    Args:
        in_channels: channels of the input ``(N, in_channels, H, W)``.
        out_channels: channels of the output ``(N, out_channels, H/stride, W/stride)``.
        stride: stride of the first convolution.

    Source: He et al., Deep Residual Learning for Image Recognition, 2016.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = _shortcut(in_channels, out_channels, stride)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    """``relu(bn(conv1x1(relu(bn(conv3x3(relu(bn(conv1x1(x)))))))) + shortcut(x))``; the stride is in the 3x3.

    Args:
        in_channels: channels of the input ``(N, in_channels, H, W)``.
        out_channels: channels of the output ``(N, out_channels, H/stride, W/stride)``.
        stride: stride of the 3x3 convolution.
        mid_channels: channels inside the block; a quarter of ``out_channels`` when None.
        groups: groups of the 3x3 convolution.

    Source: He et al. 2016, with torchvision's placement of the stride.
    """

    expansion = 4

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        mid_channels: int | None = None,
        groups: int = 1,
    ) -> None:
        super().__init__()
        mid = out_channels // self.expansion if mid_channels is None else mid_channels
        self.conv1 = nn.Conv2d(in_channels, mid, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(mid)
        self.conv2 = conv3x3(mid, mid, stride, groups)
        self.bn2 = nn.BatchNorm2d(mid)
        self.conv3 = nn.Conv2d(mid, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _shortcut(in_channels, out_channels, stride)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += identity
        return self.relu(out)


def conv_bn_relu(
    in_channels: int,
    out_channels: int,
    kernel_size: int = 3,
    stride: int = 1,
    bias: bool = False,
    pool_before: bool = False,
    max_pool_after: bool = False,
) -> nn.Sequential:
    """``relu(bn(conv(x)))`` with named children ``pool, conv, bn, relu, maxpool`` (those that apply).

    ``(N, in_channels, H, W) -> (N, out_channels, H', W')``, padded by half of the kernel.

    Args:
        in_channels: channels of x.
        out_channels: channels of the output.
        kernel_size: odd.
        stride: of the convolution.
        bias: whether the convolution has one.
        pool_before: put a 2x2 max pooling in front (VGG: a pooling belongs to the convolution after it).
        max_pool_after: add a 3x3 max pooling of stride 2 (the stem of an ImageNet ResNet).
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=bias)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    if pool_before:
        parts["pool"] = nn.MaxPool2d(2)
    parts["conv"] = conv
    parts["bn"] = nn.BatchNorm2d(out_channels)
    parts["relu"] = nn.ReLU(inplace=True)
    if max_pool_after:
        parts["maxpool"] = nn.MaxPool2d(3, stride=2, padding=1)
    layer = nn.Sequential(parts)
    initialise(layer)
    return layer


def initialise(module: nn.Module, zero_biases: bool = True) -> None:
    """Convolutions from N(0, sqrt(2 / (k*k*out_channels))), BatchNorm 1 and 0, ``nn.Linear`` left as torch makes it.

    The initialisation of both papers' released code (AugLocal, ContSup). Grouped convolutions divide the fan by
    the number of groups as ``nn.init.kaiming_normal_(mode="fan_out")`` does. Biases of convolutions become 0, or keep
    the random values of torch.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            fan_out = part.kernel_size[0] * part.kernel_size[1] * part.out_channels // part.groups
            nn.init.normal_(part.weight, 0.0, math.sqrt(2.0 / fan_out))
            if part.bias is not None and zero_biases:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d) and part.affine:
            nn.init.ones_(part.weight)
            nn.init.zeros_(part.bias)

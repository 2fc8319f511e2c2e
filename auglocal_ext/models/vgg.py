"""VGG networks with BatchNorm as ``nn.Sequential`` of their layers."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from .blocks import conv_bn_relu

_CONFIGS = {
    13: ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}


def _vgg(depth: int, num_classes: int) -> nn.Sequential:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    channels = 3
    for stage, widths in enumerate(_CONFIGS[depth]):
        for i, width in enumerate(widths):
            # A pooling belongs to the convolution after it (AugLocal's split of VGG).
            layer = conv_bn_relu(channels, width, bias=True, pool_before=stage > 0 and i == 0)
            parts[f"layer{stage + 1}_{i}"] = layer
            channels = width
    classifier = nn.Sequential(
        OrderedDict(
            maxpool=nn.MaxPool2d(2),
            pool=nn.AdaptiveAvgPool2d(7),
            flatten=nn.Flatten(),
            fc1=nn.Linear(512 * 7 * 7, 4096),
            relu1=nn.ReLU(inplace=True),
            drop1=nn.Dropout(),
            fc2=nn.Linear(4096, 4096),
            relu2=nn.ReLU(inplace=True),
            drop2=nn.Dropout(),
            fc3=nn.Linear(4096, num_classes),
        )
    )
    for part in classifier:
        if isinstance(part, nn.Linear):  # as in torchvision's VGG and AugLocal's released code
            nn.init.normal_(part.weight, 0.0, 0.01)
            nn.init.zeros_(part.bias)
    parts["classifier"] = classifier
    return nn.Sequential(parts)


def vgg13(num_classes: int = 1000) -> nn.Sequential:
    """VGG13 with BatchNorm: 10 convolution layers; the fully connected part belongs to the last."""
    return _vgg(13, num_classes)


def vgg19(num_classes: int = 1000) -> nn.Sequential:
    """VGG19 with BatchNorm: 16 convolution layers; the fully connected part belongs to the last."""
    return _vgg(19, num_classes)

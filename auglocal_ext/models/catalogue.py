"""This package's networks by name."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import nn

from .resnet import resnet18, resnet34, resnet50, resnet101, resnet_cifar
from .vgg import vgg13, vgg19
from .vit import vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_s_16, vit_t_16

#: ``resnet_cifar(8)``, 4 local layers.
resnet8 = functools.partial(resnet_cifar, 8)
#: ``resnet_cifar(20)``, 10 local layers.
resnet20 = functools.partial(resnet_cifar, 20)
#: ``resnet_cifar(32)``, 16 local layers.
resnet32 = functools.partial(resnet_cifar, 32)
#: ``resnet_cifar(56)``, 28 local layers.
resnet56 = functools.partial(resnet_cifar, 56)
#: ``resnet_cifar(110)``, 55 local layers.
resnet110 = functools.partial(resnet_cifar, 110)

_CIFAR: dict[str, Callable[..., nn.Sequential]] = {
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet56": resnet56,
    "resnet110": resnet110,
}
_IMAGENET: dict[str, Callable[..., nn.Sequential]] = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "vgg13": vgg13,
    "vgg19": vgg19,
}
_VITS: dict[str, Callable[..., nn.Sequential]] = {
    "vit_t_16": vit_t_16,
    "vit_s_16": vit_s_16,
    "vit_b_16": vit_b_16,
    "vit_b_32": vit_b_32,
    "vit_l_16": vit_l_16,
    "vit_l_32": vit_l_32,
}
#: Networks that :func:`build` knows.
NAMES: tuple[str, ...] = (*_CIFAR, *_IMAGENET, *_VITS)


def build(
    name: str, num_classes: int | None = None, width: int | None = None, image_size: int | None = None
) -> nn.Sequential:
    """The network ``name`` (one of ``NAMES``) with fresh weights.

    Args:
        name: network name, e.g. ``"resnet32"``.
        num_classes: outputs; 10 for CIFAR networks and 1000 for ImageNet ones when None.
        width: width of the first stage of a CIFAR ResNet (16 when None); no other network takes it.
        image_size: height and width of the images of a vision transformer (224 when None); others take any.

    Raises:
        ValueError: if the name is unknown, or ``width`` is given for a network that has none.
    """
    if name in _CIFAR:
        return _CIFAR[name](
            num_classes=10 if num_classes is None else num_classes, width=16 if width is None else width
        )
    if name not in NAMES:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(NAMES)}")
    if width is not None:
        raise ValueError(f"width applies to CIFAR ResNets ({', '.join(_CIFAR)}), not to {name}")
    classes = 1000 if num_classes is None else num_classes
    if name in _VITS:
        return _VITS[name](image_size=224 if image_size is None else image_size, num_classes=classes)
    return _IMAGENET[name](num_classes=classes)


def input_shape(name: str) -> tuple[int, int, int]:
    """``(channels, height, width)`` of the images the network ``name`` was designed for."""
    if name not in NAMES:
        raise ValueError(f"unknown network {name!r}; known: {', '.join(NAMES)}")
    return (3, 32, 32) if name in _CIFAR else (3, 224, 224)

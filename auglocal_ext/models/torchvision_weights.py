"""Key maps from torchvision's state dicts to those of :mod:`auglocal_ext.models`."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from .vgg import _CONFIGS as _VGG_CONFIGS

_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101")
_VGGS = {"vgg13": 13, "vgg19": 19}


def _resnet_key(key: str) -> str:
    key = re.sub(r"^layer(\d)\.(\d+)\.", r"layer\1_\2.", key)
    for theirs, ours in (("conv1.", "stem.conv."), ("bn1.", "stem.bn."), ("fc.", "classifier.fc.")):
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return key


def _vgg_prefixes(depth: int) -> dict[str, str]:
    prefixes = {"classifier.0.": "classifier.fc1.", "classifier.3.": "classifier.fc2."}
    prefixes["classifier.6."] = "classifier.fc3."
    index = 0
    for stage, widths in enumerate(_VGG_CONFIGS[depth]):
        for i in range(len(widths)):
            prefixes[f"features.{index}."] = f"layer{stage + 1}_{i}.conv."
            prefixes[f"features.{index + 1}."] = f"layer{stage + 1}_{i}.bn."
            index += 3  # convolution, BatchNorm, ReLU
        index += 1  # max pooling
    return prefixes


def from_torchvision(name: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """State dict of torchvision's network ``name`` with this package's keys; the tensors are shared, not copied.

    Args:
        name: ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, ``vgg13`` or ``vgg19`` (the two VGGs are
            torchvision's ``vgg13_bn`` and ``vgg19_bn``).
        state_dict: what ``torchvision.models.<name>(weights=...).state_dict()`` returns.

    Raises:
        ValueError: if there is no key map for ``name``, or a key is not one of that network's.

    Example:
        >>> net = resnet34()
        >>> net.load_state_dict(from_torchvision("resnet34", torchvision.models.resnet34().state_dict()))
    """
    if name in _RESNETS:
        return {_resnet_key(key): value for key, value in state_dict.items()}
    if name not in _VGGS:
        known = ", ".join((*_RESNETS, *_VGGS))
        raise ValueError(f"torchvision weights can be loaded into {known}; got {name!r}")
    prefixes = _vgg_prefixes(_VGGS[name])
    result = {}
    for key, value in state_dict.items():
        prefix, _, field = key.rpartition(".")
        ours = prefixes.get(prefix + ".")
        if ours is None:
            raise ValueError(
                f"unexpected key {key!r}: expected the state dict of torchvision's {name}_bn (with BatchNorm)"
            )
        result[ours + field] = value
    return result

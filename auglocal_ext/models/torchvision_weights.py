"""Key maps from torchvision's state dicts to those of :mod:`auglocal_ext.models`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from .resnet import resnet18, resnet34, resnet50, resnet101
from .vgg import _CONFIGS as _VGG_CONFIGS
from .vgg import vgg13, vgg19
from .vit import vit_b_16, vit_b_32, vit_l_16, vit_l_32

_RESNETS = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50, "resnet101": resnet101}
_VGGS = {"vgg13": 13, "vgg19": 19}
_VITS = {"vit_b_16": vit_b_16, "vit_b_32": vit_b_32, "vit_l_16": vit_l_16, "vit_l_32": vit_l_32}
_NETWORKS: dict[str, Callable[..., nn.Sequential]] = {**_RESNETS, "vgg13": vgg13, "vgg19": vgg19, **_VITS}


def _resnet_key(key: str) -> str:
    key = re.sub(r"^layer(\d)\.(\d+)\.", r"layer\1_\2.", key)
    for theirs, ours in (("conv1.", "stem.conv."), ("bn1.", "stem.bn."), ("fc.", "classifier.fc.")):
        if key.startswith(theirs):
            return ours + key[len(theirs) :]
    return key


def _vgg_key(depth: int) -> Callable[[str], str]:
    prefixes = {"classifier.0.": "classifier.fc1.", "classifier.3.": "classifier.fc2."}
    prefixes["classifier.6."] = "classifier.fc3."
    index = 0
    for stage, widths in enumerate(_VGG_CONFIGS[depth]):
        for i in range(len(widths)):
            prefixes[f"features.{index}."] = f"layer{stage + 1}_{i}.conv."
            prefixes[f"features.{index + 1}."] = f"layer{stage + 1}_{i}.bn."
            index += 3  # convolution, BatchNorm, ReLU
        index += 1  # max pooling

    def rename(key: str) -> str:
        prefix, _, field = key.rpartition(".")
        return prefixes.get(f"{prefix}.", f"{prefix}.") + field

    return rename


def _vit_key(key: str) -> str:
    for theirs, ours in (
        (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"block_\1."),
        (r"\.self_attention\.in_proj_", ".attention.qkv."),
        (r"\.self_attention\.out_proj\.", ".attention.out."),
        (r"\.ln_([12])\.", r".norm\1."),
        (r"\.mlp\.(?:0|linear_1)\.", ".mlp.up."),  # files of old releases have the second name
        (r"\.mlp\.(?:3|linear_2)\.", ".mlp.down."),
        (r"^conv_proj\.", "embedding.proj."),
        (r"^class_token$", "embedding.class_token"),
        (r"^encoder\.pos_embedding$", "embedding.positions"),
        (r"^encoder\.ln\.", "norm."),
        (r"^heads\.head\.", "classifier.fc."),
    ):
        key = re.sub(theirs, ours, key)
    return key


def from_torchvision(name: str, state_dict: Mapping[str, Tensor], num_classes: int | None = None) -> dict[str, Tensor]:
    """State dict of torchvision's network ``name`` with this package's keys; the tensors are shared, not copied.

    Args:
        name: ``resnet18``, ``resnet34``, ``resnet50``, ``resnet101``, ``vgg13`` or ``vgg19`` (the two VGGs are
            torchvision's ``vgg13_bn`` and ``vgg19_bn``), ``vit_b_16``, ``vit_b_32``, ``vit_l_16`` or ``vit_l_32``.
        state_dict: what ``torchvision.models.<name>(weights=...).state_dict()`` returns, or ``torch.load`` of a file
            that holds it; keys may begin with the ``module.`` of DataParallel.
        num_classes: classes of the network that is to be fine-tuned: the last linear layer is then a new one of as many
            outputs, with torch's default initialization. None keeps the layer of ``state_dict``.

    Raises:
        TypeError: if ``state_dict`` is no mapping of names to tensors.
        ValueError: if there is no key map for ``name``, if keys or shapes are not those of that network, or if
            ``num_classes`` is less than 1.

    Example:
        >>> net = resnet34(num_classes=5)
        >>> weights = torch.load("resnet34.pth", weights_only=True)
        >>> net.load_state_dict(from_torchvision("resnet34", weights, num_classes=5))
    """
    if name not in _NETWORKS:
        known = ", ".join(_NETWORKS)
        raise ValueError(f"torchvision weights can be loaded into {known}; got {name!r}")
    if num_classes is not None and num_classes < 1:
        raise ValueError(f"num_classes is at least 1, or None to keep the classifier; got {num_classes}")
    _check_tensors(state_dict)
    if all(key.startswith("module.") for key in state_dict):
        state_dict = {key.removeprefix("module."): value for key, value in state_dict.items()}
    rename = _resnet_key if name in _RESNETS else _vit_key if name in _VITS else _vgg_key(_VGGS[name])
    result = {rename(key): value for key, value in state_dict.items()}
    last = "classifier.fc3" if name in _VGGS else "classifier.fc"
    _check_network(name, state_dict, result, last)
    if num_classes is not None:
        weight = result[f"{last}.weight"]
        fresh = nn.Linear(weight.shape[1], num_classes, device=weight.device, dtype=weight.dtype)
        result |= {f"{last}.{key}": value for key, value in fresh.state_dict().items()}
    return result


def _check_tensors(state_dict: object) -> None:
    """TypeError unless it is a mapping of names to tensors."""
    expected = "state_dict must be a mapping of names to tensors"
    if isinstance(state_dict, (str, os.PathLike)):
        raise TypeError(
            f'{expected}, got a path; load the file first: torch.load("{os.fspath(state_dict)}", map_location="cpu", '
            "weights_only=True)"
        )
    if isinstance(state_dict, nn.Module):
        raise TypeError(f"{expected}, got a network; pass its .state_dict()")
    if not isinstance(state_dict, Mapping):
        raise TypeError(f"{expected}, got {type(state_dict).__name__}")
    nested = [key for key, value in state_dict.items() if isinstance(value, Mapping)]
    if nested:
        names = ", ".join(repr(key) for key in nested)
        raise TypeError(f"{expected}, got a checkpoint that holds mappings under {names}; pass the one of the network")
    for key, value in state_dict.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{expected}, but {key!r} holds {type(value).__name__}")


def _check_network(name: str, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], last: str) -> None:
    """ValueError unless keys and shapes are those of the network ``name``, with any number of classes."""
    with torch.device("meta"):
        expected = _NETWORKS[name](**_options(name, ours)).state_dict()
    # Files of old torch releases have no counts of batches; a load needs none.
    missing = [key for key in expected if key not in ours and not key.endswith("num_batches_tracked")]
    what = f"expected the state dict of torchvision's {name}{'_bn (with BatchNorm)' if name in _VGGS else ''}"
    for key, (renamed, value) in zip(theirs, ours.items(), strict=True):
        if renamed not in expected:
            raise ValueError(f"unexpected key {key!r}: {what}")
        shape, found = tuple(expected[renamed].shape), tuple(value.shape)
        if renamed.startswith(f"{last}."):
            shape, found = shape[1:], found[1:]
        if shape != found:
            raise ValueError(f"{key!r} has shape {tuple(value.shape)}, not {tuple(expected[renamed].shape)}: {what}")
    if missing:
        raise ValueError(f"{len(missing)} of {len(expected)} keys are missing, the first is {missing[0]!r}: {what}")


def _options(name: str, ours: Mapping[str, Tensor]) -> dict[str, int]:
    """The size of the images that a vision transformer has positions for."""
    positions = ours.get("embedding.positions")
    if name not in _VITS or positions is None or positions.dim() != 3:
        return {}
    patch = int(name.rpartition("_")[2])
    return {"image_size": max(1, math.isqrt(positions.shape[1] - 1)) * patch}

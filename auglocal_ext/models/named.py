"""Networks by name: this package's own, ``torchvision:NAME`` and ``timm:NAME``."""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from collections.abc import Sequence
from typing import Any

from torch import nn

from . import catalogue
from .torchvision_weights import from_torchvision
from .weights_file import load_published, read_state_dict

LIBRARIES = ("torchvision", "timm")

# Of torchvision's GoogLeNet, Inception and segmentation networks, which are built without them.
_HEADS_FOR_TRAINING = ("aux1.", "aux2.", "AuxLogits.", "aux_classifier.")


def check_name(name: str) -> None:
    """ValueError unless ``name`` is one of ``NAMES``, or begins with ``torchvision:`` or ``timm:``.

    Nothing is imported. Whether such a library has the network is found when it is built.
    """
    library, _, rest = name.partition(":")
    if name in catalogue.NAMES or (library in LIBRARIES and rest):
        return
    known = f"known: {', '.join(catalogue.NAMES)}, and torchvision:NAME and timm:NAME"
    raise ValueError(f"unknown network {name!r}{_nearest(name, catalogue.NAMES)}; {known}")


def network_by_name(
    name: str,
    num_classes: int | None = None,
    weights: str | os.PathLike[str] | None = None,
    *,
    width: int | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """The network ``name``, with fresh weights or those of a file. Nothing is ever downloaded.

    Args:
        name: one of ``NAMES``; ``torchvision:NAME`` of torchvision's classification or segmentation networks; or
            ``timm:NAME``.
        num_classes: outputs; :func:`default_classes` when None.
        weights: file with a published state dict, as torchvision and timm offer them, in the format of ``torch.save``
            or of safetensors. Of one for another number of classes than ``num_classes`` all but the classifier is
            loaded.
        width: of the first stage of a CIFAR ResNet.
        image_size: height and width of the images, for networks made for one size, such as vision transformers.

    Returns:
        An ``nn.Sequential`` for ``NAMES``, else the library's own class, without the heads that torchvision's networks
        have for training alone.

    Raises:
        ValueError: for an unknown name, a library that is not installed, an option that the network does not have, or
            a file that does not hold its weights.
    """
    check_name(name)
    library, _, rest = name.partition(":")
    classes = default_classes(name) if num_classes is None else num_classes
    state = None if weights is None else read_state_dict(weights)
    if name in catalogue.NAMES:
        network: nn.Module = catalogue.build(name, num_classes, width, image_size)
        if state is not None and not set(state) & set(network.state_dict()):
            state = from_torchvision(name, state, num_classes)
    elif width is not None:
        raise ValueError(f"width applies to this package's CIFAR ResNets, not to {name}")
    elif library == "torchvision":
        network = _of_torchvision(rest, classes, image_size)
        if state is not None:
            state = {key: value for key, value in state.items() if not key.startswith(_HEADS_FOR_TRAINING)}
    else:
        network = _of_timm(rest, classes, image_size)
    if state is not None:
        load_published(network, state, classes, name, replaces=num_classes is not None)
    return network


def default_classes(name: str) -> int:
    """Outputs of the network: 10 for CIFAR networks, 21 for torchvision's for segmentation, else 1000."""
    if name in catalogue.NAMES:
        return 10 if catalogue.input_shape(name)[1] == 32 else 1000
    return 21 if is_segmentation(name) else 1000


def default_input_shape(name: str) -> tuple[int, int, int]:
    """``(channels, height, width)`` of the images the network was designed for.

    Of timm's networks it is the input size of their default configuration.
    """
    if name in catalogue.NAMES:
        return catalogue.input_shape(name)
    check_name(name)
    library, _, rest = name.partition(":")
    if library == "timm":
        channels, height, width = _configuration(rest).input_size
        return (channels, height, width)
    size = 520 if is_segmentation(name) else 299 if rest == "inception_v3" else 224
    return (3, size, size)


def is_segmentation(name: str) -> bool:
    """Whether the network's output has positions: ``{"out": (N, classes, H, W)}``."""
    library, _, rest = name.partition(":")
    if library != "torchvision":
        return False
    models = _imported("torchvision").models
    return rest in models.list_models(module=models.segmentation)


def _of_torchvision(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    models = _imported("torchvision").models
    known = models.list_models(module=models) + models.list_models(module=models.segmentation)
    if name not in known:
        raise ValueError(
            f"torchvision has no network {name!r} for classification or segmentation{_nearest(name, known)}; "
            "torchvision.models.list_models() has all"
        )
    options: dict[str, Any] = {"num_classes": num_classes}
    builder = models.get_model_builder(name)
    if "weights_backbone" in inspect.signature(builder).parameters:  # whose default is a download
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):  # which warn if it is left open
        options |= {"init_weights": True, "aux_logits": False}
    if name.startswith("vit_") and image_size is not None:
        options["image_size"] = image_size
    return builder(weights=None, **options)


def _of_timm(name: str, num_classes: int, image_size: int | None) -> nn.Module:
    configuration = _configuration(name)
    options: dict[str, Any] = {"num_classes": num_classes}
    if configuration.fixed_input_size and image_size is not None:
        options["img_size"] = image_size
    try:
        return _imported("timm").create_model(name, pretrained=False, **options)
    except TypeError as error:
        if "img_size" in options and "img_size" in str(error):
            size = configuration.input_size[1]
            raise ValueError(f"timm:{name} takes images of {size} x {size} alone, not of {image_size}") from error
        raise


def _configuration(name: str) -> Any:
    """timm's default configuration of a network; ValueError if there is none of this name."""
    timm = _imported("timm")
    base, _, tag = name.partition(".")
    if not timm.is_model(name):
        raise ValueError(
            f"timm has no network {name!r}{_nearest(name, timm.list_models())}; timm.list_models() has all"
        )
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{base}.*")
        raise ValueError(f"timm has no weights {tag!r} of {base}{_nearest(name, tags)}") from error


def _imported(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except Exception as error:  # a build for another torch fails in many ways
        missing = isinstance(error, ModuleNotFoundError) and error.name == library
        why = "which is not installed" if missing else f"which cannot be imported ({error})"
        raise ValueError(f"networks of {library} need the package {library}, {why}: pip install {library}") from error


def _nearest(name: str, known: Sequence[str]) -> str:
    """The names most like ``name``, for a message; empty if there are none."""
    found = difflib.get_close_matches(name, known, 4)
    return f", did you mean {' or '.join(found)}?" if found else ""

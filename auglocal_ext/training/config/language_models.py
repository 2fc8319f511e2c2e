"""Settings that only runs on text have, and those that only runs on images have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from ...models import check_name
from ...models.gpt import MLPKind, Norm, Positions
from ..errors import SettingsError

#: Networks that are trained on text.
LANGUAGE_MODELS = ("gpt",)

#: Of the network, where they are not given.
DEFAULTS: dict[str, Any] = {
    "layers": 12,
    "width": 512,
    "heads": 8,
    "context_length": 256,
    "norm": "rms",
    "positions": "rotary",
    "mlp": "swiglu",
    "tied": False,
}

NORMS, POSITIONS, MLPS = map(get_args, (Norm, Positions, MLPKind))

#: Settings of runs on text alone.
OF_TEXT = (*(name for name in DEFAULTS if name != "width"), "tokenizer", "sample", "warmup_steps", "clip_norm")

#: Settings of runs on images alone, with the value that leaves them open.
OF_IMAGES: dict[str, Any] = dict.fromkeys(
    (
        *(
            "image_size",
            "train_images",
            "workers",
            "network_weights",
            "warmup",
            "schedule",
            "momentum",
            "mixup",
            "cutmix",
        ),
        *("padding", "padding_mode", "flip", "mean", "std"),
    )
) | {"channels_last": False, "sync_batch_norm": False}


def is_language_model(network: str) -> bool:
    """Whether it is trained on text."""
    return network in LANGUAGE_MODELS


def check_network(name: str) -> None:
    """ValueError unless there is a network of this name, for images or text."""
    if not is_language_model(name):
        try:
            check_name(name)
        except ValueError as error:
            raise ValueError(f"{error}; for text: {', '.join(LANGUAGE_MODELS)}") from error


def check_kind(settings: Mapping[str, Any]) -> None:
    """SettingsError for settings of images in a run on text, and the other way round."""
    network = settings["network"]
    if is_language_model(network):
        wrong = [name for name, left_open in OF_IMAGES.items() if settings[name] != left_open]
        what = "a run on images"
    else:
        wrong = [name for name in OF_TEXT if settings[name] is not None]
        what = f"a run on text, with --network {' or '.join(LANGUAGE_MODELS)}"
    if wrong:
        flag = "--" + wrong[0].replace("_", "-")
        raise SettingsError(f"{flag} belongs to {what}, not to one with --network {network}: leave it out")


def network_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of :func:`auglocal_ext.models.gpt` but the vocabulary."""
    found = {name: default if settings[name] is None else settings[name] for name, default in DEFAULTS.items()}
    return found | {"context": found.pop("context_length")}

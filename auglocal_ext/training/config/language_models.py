"""Settings that only runs on text have, and those that only runs on images have."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, get_args

from ...models import check_name, gpt
from ...models.gpt import MLPKind, Norm, Positions
from ..errors import SettingsError

#: Networks that are trained on text.
LANGUAGE_MODELS = ("gpt",)

# Settings of the network, and what gpt calls them.
_ARGUMENTS = {name: name for name in ("layers", "width", "heads", "norm", "positions", "mlp", "tied")} | {
    "context_length": "context"
}

#: Of the network, where they are not given.
DEFAULTS: dict[str, Any] = {
    name: inspect.signature(gpt).parameters[argument].default for name, argument in _ARGUMENTS.items()
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

# Settings of one that the other has under another name, as it counts something else.
_INSTEAD = {"warmup": "warmup_steps", "warmup_steps": "warmup"}


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
        way = f"take {_flag(_INSTEAD[wrong[0]])}" if wrong[0] in _INSTEAD else "leave it out"
        raise SettingsError(f"{_flag(wrong[0])} belongs to {what}, not to one with --network {network}: {way}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def network_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of :func:`auglocal_ext.models.gpt` but the vocabulary."""
    return {
        argument: DEFAULTS[name] if settings[name] is None else settings[name] for name, argument in _ARGUMENTS.items()
    }

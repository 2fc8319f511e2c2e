"""Published weights out of a file."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: Under which the state dict stands in published checkpoints.
_WRAPPERS = ("state_dict", "model")


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a file of ``torch.save`` or, with the ending ``.safetensors``, of safetensors.

    A checkpoint that holds it under ``"state_dict"`` or ``"model"`` is unwrapped, and the ``module.`` of DataParallel
    is taken off its keys. Nothing but tensors and plain values is unpickled.

    Raises:
        ValueError: if there is no such file, if it holds no state dict, or if safetensors is not installed.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise ValueError(f"weights {path}: no such file")
    found = _safetensors(path) if path.endswith(".safetensors") else _unpickled(path)
    for name in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
    if not isinstance(found, Mapping) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        kind = f"a {type(found).__name__}"
        if isinstance(found, Mapping):
            kind = f"a mapping with the keys {', '.join(map(repr, list(found)[:5]))}"
        raise ValueError(f"weights {path}: expected a state dict, names to tensors, found {kind}")
    if all(key.startswith("module.") for key in found):
        return {key.removeprefix("module."): value for key, value in found.items()}
    return dict(found)


def _safetensors(path: str) -> Any:
    try:
        from safetensors.torch import load_file
    except ImportError as error:
        raise ValueError(f"weights {path}: to read this file, pip install safetensors") from error
    try:
        return load_file(path)
    except Exception as error:  # of the library's own kinds, which have no common base
        raise ValueError(f"weights {path}: no file of safetensors ({error})") from error


def _unpickled(path: str) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"weights {path}: expected a state dict saved by torch.save ({reason})") from error


def load_published(network: nn.Module, state: Mapping[str, Tensor], classes: int, what: str, *, replaces: bool) -> None:
    """Give ``network`` the weights of ``state``.

    Args:
        network: changed in place.
        state: with the network's own keys.
        classes: outputs of the network.
        what: the network, for messages.
        replaces: whether the classifier stays fresh where that of ``state`` has another number of classes.

    Raises:
        ValueError: for keys or shapes that are not the network's.
    """
    own = network.state_dict()
    # Files of old torch releases have no counts of batches; a load needs none.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    for keys, problem in ((missing, "are missing"), (unexpected, "are not the network's")):
        if keys:
            raise ValueError(
                f"these are not the weights of {what}: {len(keys)} of {len(own)} keys {problem}, the first is "
                f"{keys[0]!r}"
            )
    fresh = [key for key, value in state.items() if value.shape != own[key].shape]
    for key in fresh:
        theirs, ours = tuple(state[key].shape), tuple(own[key].shape)
        counts = {len(state[other]) for other in fresh if state[other].dim()}
        if not ours or ours[0] != classes or theirs[1:] != ours[1:] or len(counts) > 1:
            raise ValueError(f"these are not the weights of {what}: {key!r} has shape {theirs}, expected {ours}")
        if not replaces:
            raise ValueError(
                f"the weights are for {theirs[0]} classes and {what} has {classes}: say num_classes={theirs[0]}, or "
                f"num_classes={classes} for a new classifier"
            )
    network.load_state_dict({key: value for key, value in state.items() if key not in fresh}, strict=False)

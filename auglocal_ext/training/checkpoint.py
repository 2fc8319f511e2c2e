"""Checkpoint files: written atomically, read without executing anything."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError

FORMAT = 6


def save(state: dict[str, Any], path: Path) -> None:
    """Write ``state`` so that ``path`` holds the old or the new one at any moment, also after a crash."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    if os.name == "posix":  # the rename itself lives in the folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load(path: Path) -> dict[str, Any]:
    """The state ``save`` wrote, tensors on the CPU; CheckpointError if there is none or it is damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint to resume from; train without --resume first")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason})") from error
    check_format(state, path)
    return state


def check_format(state: Any, path: Path) -> None:
    """CheckpointError unless this version wrote ``state``."""
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise CheckpointError(
            f"{path}: expected a checkpoint of format {FORMAT}, found {found}: another version wrote it. Go on with "
            "that version, or train the run again with another --output"
        )


def random_state(device: torch.device) -> dict[str, Tensor]:
    """States of the generators that dropout and the like draw from: the CPU's and, on CUDA, the device's."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """The inverse of ``random_state``."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)

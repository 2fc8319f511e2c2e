"""Checkpoint files: written atomically, with checksums that are compared, and read without executing anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...distributed.checkpoint_files import load_checked, readable
from ..errors import CheckpointError
from .writing import replaced

FORMAT = 6


def save(state: dict[str, Any], path: Path) -> None:
    """Write ``state`` so that ``path`` holds the old or the new one at any moment, also after a crash; OutputError."""
    with replaced(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def load(path: Path) -> dict[str, Any]:
    """The state ``save`` wrote, tensors on the CPU; CheckpointError if there is none or it is damaged."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint to resume from; train without --resume first")
    with readable(path, CheckpointError):
        state = load_checked(path)
    check_format(state, path)
    return state


def check_format(state: Any, path: Path) -> None:
    """CheckpointError unless this version wrote ``state``."""
    if not isinstance(state, dict) or type(state.get("format")) is not int or state["format"] != FORMAT:
        found = state.get("format") if isinstance(state, dict) else f"a {type(state).__name__}"
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

"""Checkpoint files: written atomically, with checksums that are compared, and read without executing anything."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError
from .writing import replaced

FORMAT = 6


def save(state: dict[str, Any], path: Path) -> None:
    """Write ``state`` so that ``path`` holds the old or the new one at any moment, also after a crash; OutputError."""
    with replaced(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def load(path: Path) -> dict[str, Any]:
    """The state ``save`` wrote, tensors on the CPU; CheckpointError if there is none or it is damaged.

    torch writes a checksum of every tensor and does not read it: here it is compared.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no checkpoint to resume from; train without --resume first")
    with unreadable(path):
        if damaged := _damaged(path):
            raise ValueError(f"{damaged} has another checksum than when it was written")
        state = torch.load(path, map_location="cpu", weights_only=True)
    check_format(state, path)
    return state


def _damaged(path: Path) -> str | None:
    with zipfile.ZipFile(path) as archive:
        return archive.testzip()


@contextmanager
def unreadable(path: Path) -> Iterator[None]:
    """CheckpointError for whatever reading ``path`` raises: the errors of damaged files are of no particular kind."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable checkpoint ({reason(error)})") from error


def reason(error: BaseException) -> str:
    """An error in one line: what it says first, and its kind where that says nothing alone."""
    lines = str(error).splitlines()
    said = lines[0] if lines else ""
    return said if " " in said else f"{type(error).__name__}: {said}" if said else type(error).__name__


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

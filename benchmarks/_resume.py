"""Results that a later command takes up: what they must agree on, what is left, and a process that starts over.

The exit status of a command that its ``--limit`` stopped is that of Ctrl-C; the same command with ``--resume`` goes on.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

INTERRUPTED = 130
LEFT_OUT = "left out: the time of the whole command was over (--limit)"
BEGUN = "begun, and not ended"
NEVER_ENDED = "the process ended, or was ended, while this was measured; not tried again"


class StartOverError(Exception):
    """This process can measure nothing more, a new one can; the message says what happened."""


def write_json(path: Path, record: dict[str, Any], indent: int = 1) -> None:
    """Whole or not at all, so that a command which is killed leaves the last state."""
    write_text(path, json.dumps(record, indent=indent) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.partial")
    temporary.write_text(text)
    os.replace(temporary, path)


def earlier(path: Path, head: dict[str, Any]) -> dict[str, Any] | None:
    """The record in a result file if its results may stand beside new ones with this head; None, and why, if not.

    They may if settings, sources, versions and GPU are the same.
    """
    try:
        record = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        print(f"{path} cannot be read ({error}): all is measured anew")
        return None
    ours, theirs = _identity(head), _identity(record)
    changed = [name for name in ours if ours[name] != theirs[name]]
    if changed:
        said = "; ".join(f"{name} {theirs[name]!r}, now {ours[name]!r}" for name in changed)
        print(f"{path} holds other results ({said}): all is measured anew")
        return None
    return record


def _identity(head: dict[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(head))  # as it comes back out of a file
    settings = {k: v for k, v in plain.get("settings", {}).items() if k not in ("load_average", "row_limit")}
    place = plain.get("environment", plain)
    return {
        "settings": settings,
        "gpu": place.get("machine", {}).get("gpu"),
        **{name: place.get(name) for name in ("commit", "sources", "versions")},
    }


def is_broken() -> bool:
    """Whether CUDA answers no more in this process, as after an illegal address: every later row would fail."""
    import torch  # here, because commands that need no torch use the rest of this file

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def start_over(script: str, arguments: Sequence[str], deadline: float) -> None:
    """Become a new process that resumes, with what time is left; a device that is broken is not broken there."""
    sys.stdout.flush()
    sys.stderr.flush()
    left = [] if deadline == float("inf") else ["--limit", str(max(deadline - time.monotonic(), 0.001))]
    os.execv(sys.executable, [sys.executable, script, *arguments, "--resume", *left])

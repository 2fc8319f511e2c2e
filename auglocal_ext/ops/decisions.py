"""Decisions about providers on disk: one small JSON file for each form, in a folder for each device and software.

The folder is ``$XDG_CACHE_HOME/auglocal_ext/providers``, or ``~/.cache/auglocal_ext/providers``. Deleting it makes
``provider="auto"`` measure again. Where it cannot be written, decisions last as long as the process.
"""

from __future__ import annotations

import json
import os
import platform
import re
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from .. import native
from .._version import __version__

Environment = dict[str, Any]


@dataclass(frozen=True)
class Decision:
    """What was measured for a form.

    Attributes:
        form: the form's name, as ``tuning.form_of`` makes it.
        provider: the one that was chosen.
        seconds: of one forward and backward pass, by provider.
        when: date and time in UTC, as in ISO 8601.
    """

    form: str
    provider: str
    seconds: dict[str, float]
    when: str


def environment(device: torch.device) -> Environment:
    """What times depend on besides the form: the device and the software, and on the CPU the number of threads."""
    found: Environment = {"device": _cpu() if device.type == "cpu" else _gpu(device)}
    if device.type == "cpu":
        found["threads"] = torch.get_num_threads()
    return {**found, **_software()}


def read(form: str, where: Environment) -> Decision | None:
    """The decision for a form; None without one. A file that cannot be used is ignored, with one warning."""
    folder = _folder(where)
    return None if folder is None else _read(folder / _file(form), where, form)


def read_all(where: Environment) -> Iterator[Decision]:
    """All decisions of this device and software, in alphabetical order."""
    folder = _folder(where)
    for path in [] if folder is None else sorted(folder.glob("*.json")):
        found = _read(path, where)
        if found is not None:
            yield found


def write(decision: Decision, where: Environment) -> None:
    """Store a decision; where that is not possible, it is not stored."""
    folder = _folder(where)
    if folder is None:
        return
    # Hosts that share the folder may have processes of one number.
    partial = folder / f"{uuid4().hex}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps({**asdict(decision), "environment": where}, indent=2))
        os.replace(partial, folder / _file(decision.form))
    except OSError:  # a read-only home, or a full disk
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _read(path: Path, where: Environment, form: str | None = None) -> Decision | None:
    try:
        found = json.loads(path.read_text())
        decision = Decision(*(found[name] for name in ("form", "provider", "seconds", "when")))
        if found["environment"] != where or form not in (None, decision.form):
            raise ValueError("it belongs to another form, device or version")
        if not isinstance(decision.form, str) or not isinstance(decision.seconds, dict):
            raise ValueError("expected the name of a form, and seconds by provider")
        if decision.provider not in decision.seconds or not all(
            isinstance(seconds, float) and seconds > 0 for seconds in decision.seconds.values()
        ):
            raise ValueError("expected seconds for each provider")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if not os.path.exists(path):  # nor where the folder may not be searched, or its name is too long
            return None
        _warn_once(f"{path} is ignored: {type(error).__name__}: {error}. Delete it to measure again")
        return None
    return decision


_warned: list[str] = []


def _warn_once(message: str) -> None:
    if not _warned:
        _warned.append(message)
        warnings.warn(message, stacklevel=2)


def _folder(where: Environment) -> Path | None:
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        cache = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    except RuntimeError:  # no home directory
        return None
    return cache / "auglocal_ext" / "providers" / _slug("_".join(f"{key}-{where[key]}" for key in where))


def _file(form: str) -> str:
    return f"{_slug(form)}.json"


def _slug(text: str) -> str:
    return re.sub(r"[^\w.]+", "-", text)


@lru_cache(maxsize=None)
def _software() -> Environment:
    build = native.build()
    sources = "" if isinstance(build, str) else str(build.info.get("sources", ""))
    return {"auglocal_ext": f"{__version__} {sources[:12]}".strip(), "torch": torch.__version__}


@lru_cache(maxsize=None)
def _cpu() -> str:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    # ATEN_CPU_CAPABILITY can hold it down, for this library's kernels as for torch's.
    return f"{name} {torch.backends.cpu.get_cpu_capability()}"


@lru_cache(maxsize=None)
def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)

"""Where a benchmark ran: what a result file must say so that its numbers can be judged.

Imported before the package by every benchmark: it makes a checkout that is not installed importable.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

try:
    from auglocal_ext import __version__
except ModuleNotFoundError:  # run from a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from auglocal_ext import __version__


def environment() -> dict[str, Any]:
    """Command, date, machine, GPU, driver, versions and commit, as plain values for JSON.

    ``sources`` tells the sources where git does not, as in a copy without its history.
    """
    return {
        "command": " ".join(["python", *(_relative(part) for part in sys.argv)]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
        "sources": _sources(),
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "processor": _processor(),
            "cores": os.cpu_count(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "cuda": torch.version.cuda,
            "auglocal_ext": __version__,
        },
    }


def _relative(argument: str) -> str:
    """File arguments without the folders of this machine."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    root = Path(__file__).resolve().parents[1]
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def _commit() -> str | None:
    folder = str(Path(__file__).resolve().parent)
    commit = _output("git", "-C", folder, "rev-parse", "HEAD")
    if commit and _output("git", "-C", folder, "status", "--porcelain", "--untracked-files=no"):
        commit += " with local changes"
    return commit


def _sources() -> str:
    """A digest of package, kernels and benchmarks: names and contents."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for folder, ends in (("auglocal_ext", (".py", ".toml")), ("csrc", (".h", ".cpp", ".cu")), ("benchmarks", (".py",))):
        for path in sorted(path for path in (root / folder).rglob("*") if path.suffix in ends):
            if path.name != "_build_info.py":
                digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None

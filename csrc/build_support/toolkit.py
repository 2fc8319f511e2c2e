"""The CUDA toolkit of the build, and which GPUs it compiles for. Standard library alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

# Machine code for each line of data-centre and desktop GPUs from Ampere on. 8.7, 10.1 and others like them are systems
# on a chip, whose builds find their own GPU.
EVERY = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
# Where no GPU is found. Code for 8.0 also runs on 8.6 and 8.9; newer GPUs than 9.0 compile its PTX at first use.
# Together they take half the time of all above.
SHORT = ("8.0", "9.0")


class NotBuilt(Exception):
    """Why a provider cannot be built here, in words for the user."""


def output(*command: str, timeout: float | None = None) -> str:
    """What a command prints, on either stream; nothing where it cannot be run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=timeout
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout


def find_toolkit() -> Path:
    """Root of the CUDA toolkit: CUDA_HOME, else that of the nvcc on PATH, else /usr/local/cuda."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        root = toolkit_of(Path(named) / "bin" / "nvcc")
        if root is None:
            raise NotBuilt(f"CUDA_HOME={named} holds no CUDA toolkit (no working bin/nvcc with its headers)")
        return root
    on_path = shutil.which("nvcc")
    for nvcc in (on_path, "/usr/local/cuda/bin/nvcc"):
        root = toolkit_of(Path(nvcc)) if nvcc else None
        if root is not None:
            return root
    raise NotBuilt(
        "no CUDA toolkit found (no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda); "
        "set CUDA_HOME to a toolkit and run `pip install .` again"
    )


def toolkit_of(nvcc: Path) -> Path | None:
    """The toolkit which an nvcc belongs to; the file itself may be a wrapper that lies elsewhere, so it is asked."""
    if not nvcc.is_file():
        return None
    top = re.search(r"^#\$ TOP=(.+)$", output(str(nvcc), "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    if top is None:
        return None
    root = Path(top.group(1).strip()).resolve()
    headers = [root / "include", *root.glob("targets/*/include")]
    complete = (root / "bin" / "nvcc").is_file() and any((h / "cuda_runtime.h").is_file() for h in headers)
    return root if complete else None


def architectures(nvcc: str) -> str:
    """What to compile for without TORCH_CUDA_ARCH_LIST, in its notation: this machine's GPUs, or the short list.

    The newest architecture comes as PTX too, which costs no time, so that later GPUs can run the library.
    """
    known = known_architectures(nvcc)
    return listed(_for_gpus(known, gpus()) or _usable(SHORT, known, nvcc))


def every_architecture(nvcc: str) -> str:
    """The same for every GPU from Ampere on, as far as this nvcc knows it."""
    return listed(_usable(EVERY, known_architectures(nvcc), nvcc))


def gpus() -> set[str]:
    """Compute capabilities of the GPUs in this machine. The driver's tool is asked, which leaves CUDA alone."""
    query = output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader", timeout=60)
    return {line.strip() for line in query.splitlines() if re.fullmatch(r"\d+\.\d", line.strip())}


def known_architectures(nvcc: str) -> set[str]:
    """``9.0`` and others that the compiler makes code for."""
    numbers = re.findall(r"compute_(\d+)(\d)\b", output(nvcc, "--list-gpu-arch"))
    return {f"{major}.{minor}" for major, minor in numbers}


def listed(names: Iterable[str]) -> str:
    """``8.0;9.0+PTX``."""
    return ";".join(sorted(names, key=_number)) + "+PTX"


def gencode(names: str) -> list[str]:
    """Flags of nvcc for a list made here. torch's own knows no GPU that is newer than that torch."""
    numbers = [name.replace(".", "") for name in names.removesuffix("+PTX").split(";")]
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    return [*flags, f"-gencode=arch=compute_{numbers[-1]},code=compute_{numbers[-1]}"]


def for_host(flag: str) -> str:
    """A flag of the C++ compiler as one of nvcc, which splits it at commas and leaves the rest to a shell."""
    if os.name == "nt":
        return f"-Xcompiler={flag}"
    return "-Xcompiler='{}'".format(flag.replace(",", "\\,"))


def _for_gpus(known: set[str], present: Iterable[str]) -> set[str]:
    """For each GPU its own architecture, or the newest before it, whose PTX the driver compiles."""
    older = [[name for name in known if _number(name) <= _number(gpu)] for gpu in present]
    return {max(names, key=_number) for names in older if names}


def _usable(wanted: Iterable[str], known: set[str], nvcc: str) -> list[str]:
    usable = [name for name in wanted if name in known]
    if not usable:
        raise NotBuilt(f"{nvcc} knows none of the architectures {', '.join(wanted)}")
    return usable


def _number(name: str) -> tuple[int, ...]:
    return tuple(map(int, name.split(".")))

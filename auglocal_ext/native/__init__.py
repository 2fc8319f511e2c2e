"""The compiled libraries: where they are, whether they load, and why not.

``setup.py`` builds two libraries of kernels, ``cpu`` and ``cuda``, on the LibTorch stable ABI (target 2.11) with abi3.
One built against an old torch loads in every newer one. Each library has its own ``BuildExtension``, so one failure
leaves the others alone; the compiler's message is recorded in the generated ``_build_info.py``.

- **The CUDA toolkit** is found by asking ``nvcc --dryrun`` for its root, because the ``nvcc`` on PATH may be a
  wrapper elsewhere. torch's check that its CUDA version equals nvcc's is skipped: with the stable ABI there is
  nothing to match.
- **Only ``libtorch.so`` is linked**, which CPU builds of torch have too. cudart is linked statically, so no
  ``libcudart.so.N`` is needed. A driver too old for it is detected before the first launch and becomes the reason why
  ``cuda`` is missing. So does a GPU that no recorded target fits, machine code or PTX. A GPU is asked at its first
  tensor and never on import, where a process that will fork must not touch CUDA.
- **A library fits these Python files only if the version and the hash of ``csrc`` agree.** In the repository's root
  the source folder shadows an installed package. It uses the installed libraries where they fit and otherwise asks
  for ``pip install .``.
- **Kernels know no Python.** Build information is a generated Python file, device queries and deferred errors are
  torch's own, and the one C call goes through ctypes. The two libraries contain no Python symbol and load in every
  Python.
- **The third library, ``nodes``, fits one torch and one Python.** It holds autograd nodes, which the stable ABI lacks,
  and takes tensors from Python. Beside another torch or Python it is left out, and nodes in Python take its place with
  the same results.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import sysconfig
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .._version import __version__
from .architectures import dotted, misfit
from .sources import sources_hash

LIBRARIES = ("cpu", "cuda")

_HERE = Path(__file__).resolve().parent.parent
_SOURCES = _HERE.parent / "csrc"


@dataclass(frozen=True)
class Build:
    """What the build left beside the package it built: ``folder`` with the libraries, ``info`` as it was recorded."""

    folder: Path
    info: dict[str, Any] = field(default_factory=dict)


@lru_cache(maxsize=None)
def build() -> Build | str:
    """The build that belongs to these Python files, or the reason why there is none."""
    own = _read_info(_HERE / "_build_info.py")
    if not (_SOURCES / "cpu").is_dir():  # an installed package: its sources are elsewhere
        return Build(_HERE, own) if own else "this copy of auglocal_ext was not built; install it with `pip install .`"
    # A source tree, whose folder shadows an installed package: a library of other sources would not fit these files.
    expected = {"version": __version__, "sources": sources_hash(_SOURCES)}
    builds = [Build(_HERE, own)] if own else []
    builds += _installed()
    for candidate in builds:
        if all(candidate.info.get(key) == value for key, value in expected.items()):
            return candidate
    if builds:
        return f"the build in {builds[0].folder} is of other sources than this folder; run `pip install .` again"
    return "this source folder was not built; run `pip install .` in it"


def _installed() -> list[Build]:
    found = []
    for distribution in importlib.metadata.distributions(name="auglocal_ext"):
        folder = Path(str(distribution.locate_file("auglocal_ext"))).resolve()
        info = _read_info(folder / "_build_info.py")
        if info and folder != _HERE:
            found.append(Build(folder, info))
    return found


def _read_info(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return _imported("_auglocal_build_info", path).BUILD


def _imported(name: str, path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache(maxsize=None)
def load(name: str) -> str | None:
    """Load the library ``name``, once; why that is not possible, or None where it worked."""
    found = build()
    if isinstance(found, str):
        return found
    record = found.info["libraries"][name]
    if not record["built"]:
        return f"not built: {record['reason']}"
    try:
        torch.ops.load_library(str(_file(found, name)))
    except (OSError, RuntimeError) as error:
        return f"built, but it does not load beside torch {torch.__version__}: {error}"
    return None


@lru_cache(maxsize=None)
def nodes() -> ModuleType | str:
    """The library of autograd nodes, or the reason why those in Python take its place."""
    found = build()
    if isinstance(found, str):
        return found
    record = found.info["libraries"]["nodes"]
    if not record["built"]:
        return f"not built: {record['reason']}"
    here = {"torch": torch.__version__, "python": sysconfig.get_config_var("SOABI")}
    for part, version in here.items():
        if record[part] != version:
            return (
                f"built for {part} {record[part]}, and this is {version}; "
                "`pip install --no-build-isolation .` builds it for the torch and the Python that are there"
            )
    try:
        module: ModuleType = _imported("auglocal_ext._C_nodes", found.folder / record["file"])
    except ImportError as error:
        return f"built, but it cannot be imported: {error}"
    return module


@lru_cache(maxsize=None)
def reason(name: str) -> str | None:
    """Why the provider with the library ``name`` cannot be used, or None where it can."""
    # The driver is asked here and not on import, where a process that will fork must not touch CUDA.
    failed = load(name)
    return _driver_reason() if failed is None and name == "cuda" else failed


def device_reason(device: torch.device) -> str | None:
    """Why the cuda library, which loads, does not run on this GPU (without an index: the current one), or None."""
    if device.index is not None:
        return _device_reason(device.index)
    return _device_reason(torch.cuda.current_device()) if torch.cuda.device_count() else None


@lru_cache(maxsize=None)
def _device_reason(index: int) -> str | None:
    if index >= torch.cuda.device_count():
        return None  # of a tensor without data, which claims what it likes
    found = build()
    assert isinstance(found, Build)
    targets = found.info["libraries"]["cuda"]["targets"]
    reason = misfit(targets, torch.cuda.get_device_capability(index), *cuda_versions())
    return None if reason is None else f"cuda:{index} ({torch.cuda.get_device_name(index)}): {reason}"


def path(name: str) -> Path | None:
    """File of a library, or None where it was not built."""
    found = build()
    if isinstance(found, str) or not found.info["libraries"][name]["built"]:
        return None
    return _file(found, name)


def cuda_versions() -> tuple[int, int]:
    """CUDA versions (1000 major + 10 minor) of the cuda library's runtime and of the driver (0: there is none)."""
    runtime, driver = ctypes.c_int(0), ctypes.c_int(0)
    ctypes.CDLL(str(path("cuda"))).auglocal_cuda_versions(ctypes.byref(runtime), ctypes.byref(driver))
    return runtime.value, driver.value


def _file(found: Build, name: str) -> Path:
    return found.folder / f"_C_{name}.abi3.so"


def _driver_reason() -> str | None:
    # The library brings its own CUDA runtime, so a driver too old for it would show only at the first launch.
    runtime, driver = cuda_versions()
    if driver and driver // 1000 < runtime // 1000:
        return (
            f"built with CUDA {dotted(runtime)}, but the GPU driver supports up to {dotted(driver)}; "
            "update the driver or build with an older toolkit (CUDA_HOME)"
        )
    return None


for _name in LIBRARIES:  # here, and not at first use, so that a saved graph which holds an op finds its kernel
    load(_name)

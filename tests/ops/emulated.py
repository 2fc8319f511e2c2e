"""pytest plugin: the cuda provider of an op on CPU tensors, its .cu compiled for the host against ``emulator/``.

``python -m pytest -p emulated`` with this folder on the module path; ``AUGLOCAL_EMULATED`` names the libraries.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import column
import pytest
import torch
from torch.utils import cpp_extension

from auglocal_ext.ops import providers

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parent.parent / "csrc"
LIBRARY = "AUGLOCAL_EMULATED"


def host_source(text: str) -> str:
    """A .cu file as C++: launches become calls of the emulator, and the op is registered for CPU tensors."""
    launch = re.compile(r"([\w]+(?:<[^<>;]*>)?)<<<(.*?), (\w+), 0, stream>>>\(\s*(\w+)\)", re.DOTALL)
    text = launch.sub(r"emulator::launch(\2, \3, [&] { \1(\4); })", text)
    assert "<<<" not in text, "a launch is written in a way that is not understood here"
    for device_only in (
        r"const torch::stable::accelerator::DeviceGuard guard\(.*?\);",
        r"TORCH_ERROR_CODE_CHECK\(aoti_torch_get_current_cuda_stream\(.*?\)\);",
        r"STD_CUDA_KERNEL_LAUNCH_CHECK\(\);",
    ):
        text, found = re.subn(device_only, "", text)
        assert found, f"{device_only} is not in the source"
    return re.sub(r"(STABLE_TORCH_LIBRARY_IMPL\(\w+, )CUDA", r"\1CPU", text)


def build(op: str, folder: Path) -> Path:
    """Compile one op's .cu for the host; returns the library."""
    for header in SOURCES.rglob("*.h"):
        copy = folder / header.relative_to(SOURCES)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(header, copy)
    source = folder / "cuda" / f"{op}.cpp"
    source.write_text(host_source((SOURCES / "cuda" / f"{op}.cu").read_text()))
    library = folder / f"{op}.so"
    includes = [f"-I{path}" for path in (HERE / "emulator", *cpp_extension.include_paths())]
    subprocess.run(
        [os.environ.get("CXX", "c++"), "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", *includes]
        + ["-DTORCH_TARGET_VERSION=0x020b000000000000", str(source), "-o", str(library)]
        # A vector load that is not aligned, an error on the GPU, ends the process here.
        + ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
        + [f"-L{path}" for path in cpp_extension.library_paths()]
        + ["-Wl,--no-as-needed", "-ltorch"],
        check=True,
        capture_output=True,
        text=True,
    )
    return library


if LIBRARY in os.environ:
    for _library in os.environ[LIBRARY].split(os.pathsep):
        torch.ops.load_library(_library)
    providers._REASONS["cuda"] = lambda: None
    for name, table in providers.TABLES.items():
        rows = tuple(replace(row, devices=("cpu",)) if row.name == "cuda" else row for row in table.providers)
        providers.TABLES[name] = replace(table, providers=rows)
    column.CASES[:] = [pytest.param("cpu", "cuda", id="cpu-cuda")]

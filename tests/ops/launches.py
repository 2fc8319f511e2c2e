"""What the host functions of the Triton providers launch, compiled for a GPU that need not be there.

They are called on CPU tensors, and Triton specialises a kernel for its arguments as it would before a launch: pointers
and sizes divisible by 16 and strides of 1 are known to the compiler, which a signature alone does not tell it.
"""

from __future__ import annotations

import itertools
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class Access:
    """An instruction that reads (``LDG``) or writes (``STG``) global memory, of so many bytes a thread."""

    kind: str
    bytes: int


@dataclass(frozen=True)
class Launch:
    """A kernel as it was specialised, and its programs."""

    name: str
    grid: tuple[int, ...]
    cubin: Path

    @property
    def loops(self) -> list[list[Access]]:
        """Accesses in each loop that has some; without a loop, those of the whole kernel."""
        labels: dict[str, int] = {}
        found, lines = [], _tool("nvdisasm", "-c", str(self.cubin)).splitlines()
        for number, line in enumerate(lines):
            if label := re.match(r"(\.L_x_\d+):", line.strip()):
                labels[label.group(1)] = number
            elif (back := re.search(r"\bBRA\b.*?(\.L_x_\d+)", line)) and back.group(1) in labels:
                found.append(_accesses(lines[labels[back.group(1)] : number]))
        return [loop for loop in found if loop] or [_accesses(lines)]

    @property
    def spilled(self) -> int:
        """Bytes of a thread's stack, which is where registers that do not suffice are kept."""
        usage = re.search(r"STACK:(\d+)", _tool("cuobjdump", "-res-usage", str(self.cubin)))
        assert usage is not None
        return int(usage.group(1))


def _tool(name: str, *arguments: str) -> str:
    """What one of the disassemblers prints that Triton brings along."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([str(path), *arguments], capture_output=True, text=True, check=True).stdout


def _accesses(lines: list[str]) -> list[Access]:
    sizes = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    found = re.findall(r"\b(LDG|STG)((?:\.\w+)*)", "\n".join(lines))
    return [Access(kind, next((sizes[m] for m in suffix.split(".") if m in sizes), 4)) for kind, suffix in found]


class _Absent:
    """Triton's driver of a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> str:
        return f"a GPU of compute capability {self.capability}"  # the key of Triton's caches

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[Launch]]:
    """``launched(90, function, *arguments)``: what the function launches, compiled and not run."""
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found: list[Launch] = []
    numbers = itertools.count()
    run = JITFunction.run

    def compiled(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        cubin = tmp_path / f"{next(numbers)}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        found.append(Launch(self.__name__, grid, cubin))

    monkeypatch.setattr(JITFunction, "run", compiled)

    def launches(capability: int, function: Callable[..., Any], *arguments: Any) -> list[Launch]:
        monkeypatch.setattr(driver, "_active", _Absent(capability))
        found.clear()
        function(*arguments)
        return list(found)

    return launches


def tensor(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> torch.Tensor:
    """A map without values."""
    formats = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
    return torch.empty(shape, dtype=dtype, memory_format=formats[layout])

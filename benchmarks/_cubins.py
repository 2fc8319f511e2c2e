"""CUDA sources compiled for a GPU that need not be there, and what the machine code says of their kernels."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[1] / "csrc"
TORCH_TARGET = "0x020b000000000000"  # as in setup.py


class NoTools(Exception):
    """What is missing, in words for the user."""


@dataclass(frozen=True)
class Code:
    """Instructions in the words of the disassembler."""

    instructions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.instructions)

    def count(self, *operations: str) -> int:
        """How many of them begin with one of these, a predicate aside: ``count("LDG.E.128")``."""
        return sum(
            bool(re.match(rf"(@!?U?P\d+ )?({'|'.join(map(re.escape, operations))})", i)) for i in self.instructions
        )

    def wide(self, operation: str) -> int:
        """How many loads (``LDG``) or stores (``STG``) move 128 bits."""
        return sum(operation in instruction and ".128" in instruction for instruction in self.instructions)


@dataclass(frozen=True)
class Kernel:
    """One instance of a kernel template."""

    name: str
    arguments: tuple[str, ...]  # dtype, then integers and booleans as written in a mangled name
    registers: int
    stack: int  # bytes, which is where registers are spilled to
    shared: int  # bytes
    code: Code
    loops: tuple[Code, ...]

    def __str__(self) -> str:
        return f"{self.name}<{', '.join(self.arguments)}>" if self.arguments else self.name

    @property
    def main_loop(self) -> Code:
        """The loop with most wide accesses, then most accesses, and of such the longest."""
        return max(
            self.loops,
            key=lambda loop: (loop.wide("LDG") + loop.wide("STG"), loop.count("LDG", "STG"), len(loop)),
        )


def find_nvcc() -> str:
    """The nvcc of CUDA_HOME, on PATH or in /usr/local/cuda."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = (str(Path(home) / "bin" / "nvcc") if home else None) or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).is_file():
        raise NoTools(f"no CUDA compiler at {nvcc}")
    return nvcc


def find_tool(name: str) -> str:
    """``nvdisasm`` or ``cuobjdump``: on PATH, or those that Triton brings along."""
    found = shutil.which(name)
    if found is None:
        triton = importlib.util.find_spec("triton")
        folders = list(triton.submodule_search_locations or []) if triton else []
        candidates = [Path(folder) / "backends" / "nvidia" / "bin" / name for folder in folders]
        found = next((str(path) for path in candidates if path.is_file()), None)
    if found is None:
        raise NoTools(f"{name} is neither on PATH nor in an installed Triton")
    return found


def known_architectures() -> set[str]:
    """``sm_90`` and others that the compiler makes code for."""
    return {f"sm_{number}" for number in re.findall(r"compute_(\d+)", run(find_nvcc(), "--list-gpu-arch"))}


def compile_cubin(op: str, architecture: str, folder: Path) -> Path:
    """Machine code of ``csrc/cuda/<op>.cu`` for one architecture (``sm_90``), with the options of the build."""
    from torch.utils import cpp_extension

    cubin = folder / f"{op}-{architecture}.cubin"
    command = [find_nvcc(), "-cubin", f"-arch={architecture}", "-std=c++20", "-O3", "-DUSE_CUDA"]
    command += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", *(f"-I{path}" for path in cpp_extension.include_paths())]
    run(*command, str(SOURCES / "cuda" / f"{op}.cu"), "-o", str(cubin))
    return cubin


def kernels(cubin: Path) -> list[Kernel]:
    """All kernels of a cubin."""
    usage = run(find_tool("cuobjdump"), "-res-usage", str(cubin))
    functions = _functions(run(find_tool("nvdisasm"), str(cubin)))
    found = []
    for symbol, registers, stack, shared in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        name, arguments = _demangled(symbol)
        code, loops = _instructions(functions[symbol])
        found.append(Kernel(name, arguments, int(registers), int(stack), int(shared), code, loops))
    return found


def run(*command: str) -> str:
    """What a command prints; RuntimeError with its complaint where it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command[:2])}: {(done.stderr or done.stdout)[-2000:]}")
    return done.stdout


def _demangled(symbol: str) -> tuple[str, tuple[str, ...]]:
    """``apply_kernel`` and ``("BFloat16", "8", "1")`` of the mangled name of an instance."""
    named = re.search(r"\d([a-z_]+_kernel)", symbol)
    if named is None:
        raise ValueError(f"not the name of a kernel: {symbol}")
    arguments: list[str] = []
    dtypes = {"f": "float", "d": "double"}
    pattern = r"N(?:3c10|S\w*?_)\d+([A-Za-z0-9]+?)E|L(?:[a-z]|N\w+?E)(\d+)E|([fd])|(S\w*?_)"
    if symbol[named.end(1)] == "I":
        for dtype, value, letter, repeated in re.findall(pattern, symbol[named.end(1) + 1 :].split("EEv")[0] + "E"):
            arguments.append(dtype or value or dtypes.get(letter) or (arguments[-1] if repeated else ""))
    return named.group(1), tuple(arguments)


def _functions(text: str) -> dict[str, list[str]]:
    functions: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        section = re.match(r"\s*\.section\s+(\S+?),", line)
        if section is None:
            lines.append(line)
        else:
            lines = functions.setdefault(section.group(1).removeprefix(".text."), [])
    return functions


def _instructions(lines: list[str]) -> tuple[Code, tuple[Code, ...]]:
    """All instructions but padding, and the loops: what lies between a label and a branch back to it."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    loops = []
    for line in lines:
        label = re.match(r"\s*(\.L_x_\d+):", line)
        instruction = re.match(r"\s*/\*[0-9a-f]+\*/\s+\{?\s*(.*?)\s*;", line)
        if label is not None:
            labels[label.group(1)] = len(instructions)
        elif instruction is not None and instruction.group(1) != "NOP":
            instructions.append(instruction.group(1))
            back = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction.group(1))
            if back is not None and back.group(1) in labels:
                loops.append(Code(tuple(instructions[labels[back.group(1)] :])))
    return Code(tuple(instructions)), tuple(loops)

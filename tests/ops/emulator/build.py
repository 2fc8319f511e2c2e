"""Compiles the emulator and what runs on it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from auglocal_ext.ops import providers

from .translate import host_source

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
SOURCES = ROOT / "csrc"
RUNTIME = "emulator_runtime"
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
# Every access to memory calls the emulator; a loop that the compiler made a memset or a memcpy would not.
CHECKED = ["-fsanitize=thread", "-fsanitize=alignment,bounds", "-fno-tree-loop-distribute-patterns"]
ADDRESS = ["-fsanitize=address", "-fno-omit-frame-pointer"]


def compiler() -> str | None:
    """The C++ compiler, or None where there is none or the system is not Linux."""
    return shutil.which(os.environ.get("CXX", "c++")) if sys.platform.startswith("linux") else None


def build_runtime(folder: Path, sanitize: Sequence[str] = ()) -> Path:
    """Compile the module into ``folder``; returns its file. ``sanitize`` are options that ops are built with too."""
    import pybind11

    work = folder / "runtime"
    includes = [f"-isystem{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"])]

    def compiled(source: Path) -> Path:  # what Python calls need not be fast, and pybind11 takes long to optimise
        optimise = "-O0" if source.stem == "module" else "-O2"
        return _compile(source, work, [optimise, *includes, *_torch_includes(), *sanitize])

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sorted(HERE.glob("*.cpp"))))
    library = folder / f"{RUNTIME}.so"
    return _link(library, objects, [*sanitize, *_torch_folders(), "-lc10", f"-Wl,-soname,{library.name}"])


def build(source: Path, folder: Path, sanitize: Sequence[str] = CHECKED, torch: bool = True) -> Path:
    """Compile a .cu file for the runtime in ``folder``; returns the library. Without ``torch`` it uses none of it."""
    work = folder / source.stem
    options = ["-O1", "-g1", f"-I{HERE}", *sanitize]
    options += [f"-ffile-prefix-map={work}=csrc", f"-ffile-prefix-map={os.getcwd()}=."]
    # Without -fsanitize=thread, which would bring ThreadSanitizer's own definitions.
    link = [option for option in sanitize if option in ADDRESS]
    includes = "#include <cuda_runtime.h>\n"
    (work / "cuda").mkdir(parents=True, exist_ok=True)
    if torch:
        for path in SOURCES.rglob("*.h"):
            copy = work / path.relative_to(SOURCES)
            copy.parent.mkdir(exist_ok=True)
            copy.write_text(host_source(path.read_text(), f"csrc/{path.relative_to(SOURCES)}"))
        options += [TORCH_TARGET, *_torch_includes()]
        link += _torch()
        includes += '#include "tensors.h"\n'
    translated = work / "cuda" / f"{source.stem}.cpp"
    name = str(source.relative_to(ROOT)) if source.is_relative_to(ROOT) else source.name
    translated.write_text(includes + host_source(source.read_text(), name))
    link += [f"-L{folder}", f"-l:{RUNTIME}.so", "-Wl,-rpath,$ORIGIN"]
    return _link(folder / f"{source.stem}.so", [_compile(translated, work, options)], link)


def compiled_ops() -> list[str]:
    """The ops that have a cuda provider."""
    return [op for op, table in providers.TABLES.items() if any(row.name == "cuda" for row in table.providers)]


def build_ops(folder: Path, sanitize: Sequence[str] = CHECKED) -> None:
    """Compile the kernels of every op for the runtime in ``folder``, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda op: build(SOURCES / "cuda" / f"{op}.cu", folder, sanitize), compiled_ops()))


def build_cpu(library: Path, work: Path, sanitize: Sequence[str]) -> Path:
    """Compile the cpu provider into ``library``."""
    options = ["-O1", "-g1", "-fno-trapping-math", TORCH_TARGET, *_torch_includes(), *sanitize]
    objects = [_compile(source, work, options) for source in sorted((SOURCES / "cpu").glob("*.cpp"))]
    return _link(library, objects, [*sanitize, *_torch()])


def load_runtime(folder: Path) -> ModuleType:
    """The module, as ``build_runtime`` made it in ``folder``; in a process that has it already, that one."""
    if RUNTIME not in sys.modules:
        spec = importlib.util.spec_from_file_location(RUNTIME, folder / f"{RUNTIME}.so")
        assert spec is not None and spec.loader is not None
        sys.modules[RUNTIME] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[RUNTIME])
    return sys.modules[RUNTIME]


def _torch_includes() -> list[str]:
    from torch.utils import cpp_extension

    return [f"-isystem{path}" for path in cpp_extension.include_paths()]


def _torch_folders() -> list[str]:
    from torch.utils import cpp_extension

    return [f"-L{path}" for path in cpp_extension.library_paths()]


def _torch() -> list[str]:
    return [*_torch_folders(), "-Wl,--no-as-needed", "-ltorch"]


def _compile(source: Path, folder: Path, options: Sequence[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{source.stem}.o"
    _run(["-std=c++20", "-fPIC", "-fvisibility=hidden", "-c", str(source), *options, "-o", str(made)])
    return made


def _link(library: Path, objects: Iterable[Path], options: Sequence[str]) -> Path:
    _run(["-shared", *map(str, objects), *options, "-o", str(library)])
    return library


def _run(arguments: list[str]) -> None:
    command = [compiler() or "c++", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-4000:]}")

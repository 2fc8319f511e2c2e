"""Builds the compiled providers, each a library of its own and each optional; the metadata is in pyproject.toml.

Environment: CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CC, CXX as usual; AUGLOCAL_FORCE_EXT=1 turns a provider that
cannot be built from a recorded reason into an error.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pprint
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020b000000000000"  # stable ABI of torch 2.11, one hexadecimal byte per number
DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
SOURCES = {
    "cpu": [
        "csrc/cpu/batch_norm_act.cpp",
        "csrc/cpu/batch_norm_act_max_pool.cpp",
        "csrc/cpu/pooled_cross_entropy.cpp",
        "csrc/cpu/reconstruction_loss.cpp",
        "csrc/cpu/similarity_loss.cpp",
        "csrc/cpu/supervised_contrast.cpp",
    ],
    "cuda": [
        "csrc/cuda/batch_norm_act.cu",
        "csrc/cuda/batch_norm_act_max_pool.cu",
        "csrc/cuda/pooled_cross_entropy.cu",
        "csrc/cuda/reconstruction_loss.cu",
        "csrc/cuda/similarity_loss.cu",
        "csrc/cuda/supervised_contrast.cu",
        "csrc/cuda/versions.cu",
    ],
}


class NotBuilt(Exception):
    """Why a provider cannot be built here, in words for the user."""


def package_file(*parts: str) -> Any:
    """A module of the package, without importing the package (which needs its libraries)."""
    path = ROOT.joinpath("auglocal_ext", *parts)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def output(*command: str) -> str:
    """What a command prints, on either stream; nothing where it cannot be run."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError:
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


def default_architectures(nvcc: Path) -> str:
    """Our list as far as this nvcc knows it, the newest also as PTX so that later GPUs can run it."""
    known = set(re.findall(r"compute_(\d+)", output(str(nvcc), "--list-gpu-arch")))
    usable = [arch for arch in DEFAULT_ARCHITECTURES if arch.replace(".", "") in known]
    if not usable:
        raise NotBuilt(f"{nvcc} knows none of the architectures {', '.join(DEFAULT_ARCHITECTURES)}")
    return ";".join(usable) + "+PTX"


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Collects what compilers print into the list, and prints it afterwards."""
    lines: list[str] = []
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with tempfile.TemporaryFile() as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield lines
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, stream)
                os.close(copy)
            log.seek(0)
            text = log.read().decode(errors="replace")
            lines += text.splitlines()
            print(text, flush=True)


class BuildLibraries(build_ext):
    """Builds each library by a torch BuildExtension of its own, so that one's failure leaves the other alone."""

    def run(self) -> None:
        libraries, built = {}, []
        for name, extension in zip(SOURCES, self.extensions, strict=True):
            library = Path(self.get_ext_fullpath(extension.name))
            for stale in {library, Path(self.build_lib) / self.get_ext_filename(extension.name)}:
                stale.unlink(missing_ok=True)
            record: dict[str, Any] = {"built": True, "reason": ""}
            try:
                self._build(name, extension, record)
                built.append(extension)
            except Exception as error:
                if os.environ.get("AUGLOCAL_FORCE_EXT") == "1":
                    raise
                record.update(built=False, reason=str(error))
            libraries[name] = record
        self.extensions = built
        self._write_info(libraries)

    def _build(self, name: str, extension: Extension, record: dict[str, Any]) -> None:
        try:
            import torch
            from torch.utils import cpp_extension
        except Exception as error:
            raise NotBuilt(f"torch cannot be imported by the build ({type(error).__name__}: {error})") from error

        extension.include_dirs = cpp_extension.include_paths()
        extension.library_dirs = cpp_extension.library_paths()
        common = ["-O3", "-g0", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
        # Nobody reads floating-point exception flags, and keeping them forbids vectorising a choice between two values.
        extension.extra_compile_args = {"cxx": [*common, "-fvisibility=hidden", "-fno-trapping-math"]}
        if name == "cuda":
            toolkit = find_toolkit()
            nvcc = toolkit / "bin" / "nvcc"
            if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
                os.environ["TORCH_CUDA_ARCH_LIST"] = default_architectures(nvcc)
            # torch would make the same flags by itself; passed by us they are those that the record is made of.
            architectures = cpp_extension._get_cuda_arch_flags()
            extension.extra_compile_args["nvcc"] = [
                common[0],
                common[2],
                "-DUSE_CUDA",
                "-Xcompiler=-fvisibility=hidden",
                *architectures,
            ]
            self._link_runtime(toolkit, extension, record)
            record["nvcc"] = "".join(re.findall(r"release ([\d.]+)", output(str(nvcc), "--version")))
            record["targets"] = package_file("native", "architectures.py").targets(architectures)
            # The stable ABI needs no agreement between nvcc and the CUDA version of the torch at hand, which may have
            # none: its check is for extensions linked against it.
            torch.version.cuda = None
            cpp_extension.CUDA_HOME = str(toolkit)

        command = cpp_extension.BuildExtension(self.distribution)
        command.build_lib, command.build_temp, command.inplace = self.build_lib, self.build_temp, self.inplace
        command.force = True
        command.ensure_finalized()
        command.extensions = [extension]
        with recorded() as lines:
            try:
                command.run()
            except (Exception, SystemExit) as error:
                failure: BaseException | None = error
            else:
                failure = None
        if failure is not None:
            told = [line.strip() for line in lines if re.search(r"\berror\b|not found|failed", line, re.IGNORECASE)]
            raise NotBuilt("; ".join([f"the build failed ({failure})", *told[:3]])) from failure

    @staticmethod
    def _link_runtime(toolkit: Path, extension: Extension, record: dict[str, Any]) -> None:
        # The CUDA runtime goes into the library: one that asked for libcudart.so.13 would not load beside a torch of
        # CUDA 12. Its symbols are kept inside, where they cannot meet those of torch's own runtime.
        folders = [toolkit / "lib64", *toolkit.glob("targets/*/lib"), toolkit / "lib"]
        static = [folder for folder in folders if (folder / "libcudart_static.a").is_file()]
        record["runtime"] = "static" if static else "shared"
        extension.library_dirs += [str(folder) for folder in static or folders]
        extension.libraries += ["cudart_static", "dl", "rt", "pthread"] if static else ["cudart"]
        extension.extra_link_args += ["-Wl,--exclude-libs,ALL"]

    def _write_info(self, libraries: dict[str, Any]) -> None:
        package = ROOT / "auglocal_ext"
        torch = sys.modules.get("torch")
        build = {
            "version": package_file("_version.py").__version__,
            "sources": package_file("native", "sources.py").sources_hash(ROOT / "csrc"),
            "torch": str(torch.__version__) if torch else None,
            "compiler": (output(os.environ.get("CXX", "c++"), "--version").splitlines() or [""])[0],
            "libraries": libraries,
        }
        text = (
            '"""What the build made; written by setup.py."""\n\nBUILD = '
            + pprint.pformat(build, sort_dicts=False)
            + "\n"
        )
        folders = [Path(self.build_lib) / "auglocal_ext"] + ([package] if self.inplace else [])
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "_build_info.py").write_text(text)
        for name, record in libraries.items():
            print(f"auglocal_ext: {name} {'built' if record['built'] else 'not built: ' + record['reason']}")


def library(name: str) -> Extension:
    # libtorch.so is in every build of torch and leads to the libraries with the symbols, those of CUDA where it has
    # them; a linker that drops what resolves nothing by itself must be told to keep it.
    return Extension(
        f"auglocal_ext._C_{name}",
        SOURCES[name],
        extra_link_args=["-Wl,--no-as-needed", "-ltorch"] if sys.platform == "linux" else ["-ltorch"],
        py_limited_api=True,
        language="c++",
    )


if __name__ == "__main__":
    setup(
        ext_modules=[library(name) for name in SOURCES],
        cmdclass={"build_ext": BuildLibraries},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )

"""Builds the compiled providers and autograd nodes, each a library of its own and optional; see pyproject.toml.

Environment: CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CC, CXX as usual; AUGLOCAL_FORCE_EXT=1 turns a library that
cannot be built from a recorded reason into an error.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pprint
import re
import shlex
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TORCH_TARGET = "0x020b000000000000"  # stable ABI of torch 2.11, one hexadecimal byte per number
SOURCES = {
    "cpu": [
        "csrc/cpu/batch_norm_act.cpp",
        "csrc/cpu/batch_norm_act_max_pool.cpp",
        "csrc/cpu/layer_norm.cpp",
        "csrc/cpu/linear_cross_entropy.cpp",
        "csrc/cpu/pooled_cross_entropy.cpp",
        "csrc/cpu/reconstruction_loss.cpp",
        "csrc/cpu/similarity_loss.cpp",
        "csrc/cpu/supervised_contrast.cpp",
    ],
    "cuda": [
        "csrc/cuda/batch_norm_act.cu",
        "csrc/cuda/batch_norm_act_max_pool.cu",
        "csrc/cuda/layer_norm.cu",
        "csrc/cuda/pooled_cross_entropy.cu",
        "csrc/cuda/reconstruction_loss.cu",
        "csrc/cuda/similarity_loss.cu",
        "csrc/cuda/supervised_contrast.cu",
        "csrc/cuda/versions.cu",
    ],
    "nodes": ["csrc/nodes/nodes.cpp"],
}


def load(path: str) -> Any:
    """A module by its file, without importing the package (which needs its libraries)."""
    name = "auglocal_build_" + Path(path).stem
    spec = importlib.util.spec_from_file_location(name, ROOT / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolkit, objects, progress = (load(f"csrc/build_support/{name}.py") for name in ("toolkit", "objects", "progress"))
NotBuilt, output = toolkit.NotBuilt, toolkit.output


class Recorded:
    """As a context: collects what compilers print in ``lines``, and prints it at the end; ``say`` prints at once."""

    def __enter__(self) -> Recorded:
        self.lines: list[str] = []
        sys.stdout.flush()
        sys.stderr.flush()
        self._saved = os.dup(1), os.dup(2)
        self._log = tempfile.TemporaryFile()
        os.dup2(self._log.fileno(), 1)
        os.dup2(self._log.fileno(), 2)
        return self

    def __exit__(self, *_: Any) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for stream, copy in zip((1, 2), self._saved, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
        self._log.seek(0)
        text = relative(self._log.read().decode(errors="replace"))
        self._log.close()
        self.lines += text.splitlines()
        print(text, flush=True)

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            os.write(self._saved[0], f"{line}\n".encode())


def relative(text: str) -> str:
    """``text`` with files of this source folder named from the folder on."""
    return text.replace(f"{ROOT}{os.sep}", "")


def complaints(printed: list[str]) -> list[str]:
    """The first lines in which a compiler says what is wrong."""
    lines = [line.strip() for line in printed]
    errors = [line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)]
    return (errors or [line for line in lines if re.search("not found|failed", line, re.IGNORECASE)])[:3]


class BuildLibraries(build_ext):
    """Builds each library by a torch BuildExtension of its own, so that one's failure leaves the other alone."""

    def run(self) -> None:
        libraries, built = {}, []
        self._objects = objects.Objects(Path(self.get_finalized_command("build").build_base, "objects").resolve())
        self._lock = self._objects.lock()  # held until this process ends, after the wheel is written
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
        self._objects.prune()
        self._write_info(libraries)

    def _build(self, name: str, extension: Extension, record: dict[str, Any]) -> None:
        try:
            import torch
            from torch.utils import cpp_extension
        except Exception as error:
            raise NotBuilt(f"torch cannot be imported by the build ({type(error).__name__}: {error})") from error

        extension.include_dirs = cpp_extension.include_paths()
        extension.library_dirs = cpp_extension.library_paths()
        headers = extension.include_dirs[0]
        # The message of a failed check names its file, which is the same wherever the library was built.
        places = {f"{ROOT}{os.sep}": "source", f"{headers}{os.sep}": "torch"}
        host = ["-fvisibility=hidden"]
        if os.name != "nt":  # and no shell would take an apostrophe in what nvcc passes on
            host += [f"-ffile-prefix-map={place}=" for place in places if "'" not in place]
        target = f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"
        # Nobody reads floating-point exception flags, and keeping them forbids vectorising a choice between two values.
        # Products and sums are rounded one by one: fused where the processor can, bits would depend on the processor.
        arithmetic = ["-fno-trapping-math", "-ffp-contract=off"]
        extension.extra_compile_args = {"cxx": ["-O3", "-g0", target, *arithmetic, *host]}
        if name == "nodes":  # which computes nothing, and uses torch's own interface
            extension.extra_compile_args = {"cxx": ["-O2", "-g0", *host]}
            extension.libraries += ["torch_python", "torch_cpu", "c10"]
            record["torch"], record["python"] = str(torch.__version__), sysconfig.get_config_var("SOABI")
            record["file"] = Path(self.get_ext_filename(extension.name)).name
        compilers, architectures = [os.environ.get("CXX", "c++")], ""
        if name == "cuda":
            home = toolkit.find_toolkit()
            compilers += [shlex.quote(str(home / "bin" / "nvcc")), os.environ.get("CC", "gcc")]
            architectures, code = self._architectures(home, record)
            through_nvcc = [toolkit.for_host(flag) for flag in host]
            extension.extra_compile_args["nvcc"] = ["-O3", target, "-DUSE_CUDA", *through_nvcc, *code]
            self._link_runtime(home, extension, record)
            # The stable ABI needs no agreement between nvcc and the CUDA version of the torch at hand, which may have
            # none: its check is for extensions linked against it.
            torch.version.cuda = None
            cpp_extension.CUDA_HOME = str(home)

        made_with = [
            *(torch.__version__, torch.version.git_version, objects.headers_digest(Path(headers))),
            *(output(*shlex.split(compiler), "--version") for compiler in compilers),
            objects.environment(),
            *([sysconfig.get_config_var("SOABI")] if name == "nodes" else []),
        ]

        def key(source: str, flags: Any) -> str:
            return objects.key(ROOT / source, ROOT / "csrc", objects.placeless([*made_with, flags], places))

        command = load("csrc/build_support/compile.py").ReusingBuild(self.distribution)
        command.build_lib, command.inplace, command.force = self.build_lib, self.inplace, True
        command.build_temp = os.path.join(self.build_temp, f"auglocal_ext_{name}")
        command.ensure_finalized()
        command.extensions = [extension]
        with Recorded() as printed:
            command.objects, command.key, command.say = self._objects, key, printed.say
            command.progress = lambda sources: progress.Progress(sources, architectures, printed.say)
            try:
                command.run()
            except (Exception, SystemExit) as error:
                failure: BaseException | None = error
            else:
                failure = None
        if failure is not None:
            raise NotBuilt("; ".join([f"the build failed ({failure})", *complaints(printed.lines)])) from failure

    @staticmethod
    def _architectures(home: Path, record: dict[str, Any]) -> tuple[str, list[str]]:
        """The architectures to compile for, as a list for people and as flags of nvcc."""
        from torch.utils import cpp_extension

        nvcc = str(home / "bin" / "nvcc")
        listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        if listed:
            # torch would make the same flags by itself; passed by us they are those that the record is made of.
            code = cpp_extension._get_cuda_arch_flags()
        else:
            listed = toolkit.architectures(nvcc)
            code = toolkit.gencode(listed)
        record["nvcc"] = "".join(re.findall(r"release ([\d.]+)", output(nvcc, "--version")))
        record["targets"] = load("auglocal_ext/native/architectures.py").targets(code)
        record["every_architecture"] = toolkit.every_architecture(nvcc)
        return listed, code

    @staticmethod
    def _link_runtime(home: Path, extension: Extension, record: dict[str, Any]) -> None:
        # The CUDA runtime goes into the library: one that asked for libcudart.so.13 would not load beside a torch of
        # CUDA 12. Its symbols are kept inside, where they cannot meet those of torch's own runtime.
        folders = [home / "lib64", *home.glob("targets/*/lib"), home / "lib"]
        static = [folder for folder in folders if (folder / "libcudart_static.a").is_file()]
        record["runtime"] = "static" if static else "shared"
        extension.library_dirs += [str(folder) for folder in static or folders]
        extension.libraries += ["cudart_static", "dl", "rt", "pthread"] if static else ["cudart"]
        extension.extra_link_args += ["-Wl,--exclude-libs,ALL"]

    def _write_info(self, libraries: dict[str, Any]) -> None:
        package = ROOT / "auglocal_ext"
        torch = sys.modules.get("torch")
        build = {
            "version": load("auglocal_ext/_version.py").__version__,
            "sources": load("auglocal_ext/native/sources.py").sources_hash(ROOT / "csrc"),
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
        py_limited_api=name != "nodes",
        language="c++",
    )


if __name__ == "__main__":
    setup(
        ext_modules=[library(name) for name in SOURCES],
        cmdclass={"build_ext": BuildLibraries},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )

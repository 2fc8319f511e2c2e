"""The build and its libraries: symbols, the discovery of the toolkit, the record, the refusal of a stale build."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from auglocal_ext import native
from auglocal_ext.native.sources import sources_hash

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup_py() -> ModuleType:
    pytest.importorskip("setuptools")
    import importlib.util

    spec = importlib.util.spec_from_file_location("auglocal_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", native.LIBRARIES)
def test_library_needs_nothing_of_the_unstable_abi(name: str) -> None:
    path = native.path(name)
    if path is None:
        assert os.environ.get("AUGLOCAL_FORCE_EXT") != "1", native.reason(name)
        pytest.skip(str(native.reason(name)))
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    symbols = subprocess.run(
        [nm, "-D", "--undefined-only", "-C", str(path)], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch" in symbols  # the stable ABI is used at all
    unstable = [s for s in symbols.splitlines() if "at::" in s or "c10::" in s or " Py" in s or " cudart" in s]
    assert not unstable
    assert " cudaLaunch" not in symbols  # the CUDA runtime is inside


@pytest.mark.parametrize("name", native.LIBRARIES)
def test_library_names_no_folder_of_the_machine(name: str) -> None:
    path = native.path(name)
    if path is None:
        pytest.skip(str(native.reason(name)))
    content = path.read_bytes()
    assert b"\0csrc/" in content and b"\0torch/csrc/stable/" in content  # files that checks name
    assert not re.findall(rb"/[^\0]*/(?:csrc/c|torch/include/)[^\0]*", content)


def test_the_library_of_nodes_names_no_folder_of_the_machine() -> None:
    library = native.nodes()
    if isinstance(library, str):
        assert os.environ.get("AUGLOCAL_FORCE_EXT") != "1", library
        pytest.skip(library)
    content = Path(str(library.__file__)).read_bytes()
    assert b"csrc/nodes/nodes.cpp" in content and not re.findall(rb"/[^\0]*/(?:csrc/n|torch/include/)[^\0]*", content)


@pytest.mark.parametrize("name", native.LIBRARIES)
def test_reason_is_there_where_the_library_is_not(name: str) -> None:
    reason = native.reason(name)
    assert reason is None or (len(reason) > 10 and "\n" not in reason.strip())


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def fake_toolkit(root: Path) -> Path:
    (root / "include").mkdir(parents=True)
    (root / "include" / "cuda_runtime.h").touch()
    return executable(
        root / "bin" / "nvcc",
        f'[ "$1" = --dryrun ] && echo "#\\$ TOP={root}/bin/.." >&2\nexit 0\n',
    )


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine whose PATH holds nothing but an empty folder and the shell's own."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    folder = tmp_path / "path"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_toolkit_of_cuda_home_wins(setup_py: ModuleType, bare: Path, monkeypatch, tmp_path: Path) -> None:
    fake_toolkit(tmp_path / "one")
    shutil.copy(fake_toolkit(tmp_path / "two"), bare / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "one"))
    assert setup_py.toolkit.find_toolkit() == (tmp_path / "one").resolve()


def test_nvcc_on_path_may_be_a_wrapper(setup_py: ModuleType, bare: Path, tmp_path: Path) -> None:
    real = fake_toolkit(tmp_path / "toolkit")
    executable(bare / "nvcc", f'exec {real} "$@"\n')
    assert setup_py.toolkit.find_toolkit() == (tmp_path / "toolkit").resolve()


def test_wrong_cuda_home_is_explained(setup_py: ModuleType, bare: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "absent"))
    with pytest.raises(setup_py.NotBuilt, match="absent holds no CUDA toolkit"):
        setup_py.toolkit.find_toolkit()


def test_hash_follows_names_and_contents_alone(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder / "cpu").mkdir(parents=True)
        (tmp_path / folder / "cpu" / "x.cpp").write_text("int x;")
        (tmp_path / folder / "notes.txt").write_text(folder)
    os.utime(tmp_path / "b" / "cpu" / "x.cpp", (0, 0))
    assert sources_hash(tmp_path / "a") == sources_hash(tmp_path / "b")
    (tmp_path / "b" / "cpu" / "x.cpp").rename(tmp_path / "b" / "cpu" / "y.cpp")
    assert sources_hash(tmp_path / "a") != sources_hash(tmp_path / "b")


class Distribution:
    def __init__(self, site: Path) -> None:
        self.site = site

    def locate_file(self, path: str) -> Path:
        return self.site / path


@pytest.fixture
def source_tree(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A source folder that shadows an installed package in ``tmp_path/site``; returns the source folder."""
    package, site = tmp_path / "tree" / "auglocal_ext", tmp_path / "site" / "auglocal_ext"
    (tmp_path / "tree" / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "tree" / "csrc" / "cpu" / "x.cpp").write_text("int x;")
    package.mkdir()
    site.mkdir(parents=True)
    monkeypatch.setattr(native, "_HERE", package)
    monkeypatch.setattr(native, "_SOURCES", tmp_path / "tree" / "csrc")
    monkeypatch.setattr(
        native.importlib.metadata,
        "distributions",
        lambda name: [Distribution(package.parent), Distribution(site.parent)],
    )
    return package


def write_info(folder: Path, **changes: Any) -> None:
    sources = native._SOURCES
    build = {"version": native.__version__, "sources": sources_hash(sources), "libraries": {}, **changes}
    (folder / "_build_info.py").write_text(f"BUILD = {build!r}\n")


def test_source_folder_finds_the_installed_libraries(source_tree: Path, tmp_path: Path) -> None:
    site = tmp_path / "site" / "auglocal_ext"
    assert native.build.__wrapped__() == "this source folder was not built; run `pip install .` in it"
    write_info(site)
    assert native.build.__wrapped__().folder == site


@pytest.mark.parametrize("changes", [{"sources": "0"}, {"version": "0.0.0"}], ids=["sources", "version"])
def test_libraries_of_other_sources_are_refused(source_tree: Path, tmp_path: Path, changes: dict[str, str]) -> None:
    write_info(tmp_path / "site" / "auglocal_ext", **changes)
    assert "of other sources than this folder; run `pip install .` again" in native.build.__wrapped__()


def test_libraries_built_in_place_come_first(source_tree: Path, tmp_path: Path) -> None:
    write_info(tmp_path / "site" / "auglocal_ext")
    write_info(source_tree)
    assert native.build.__wrapped__().folder == source_tree


def test_missing_library_is_reported(source_tree: Path) -> None:
    libraries = {"cpu": {"built": False, "reason": "no compiler"}, "cuda": {"built": True, "reason": ""}}
    write_info(source_tree, libraries=libraries)
    native.build.cache_clear()
    try:
        assert native.load.__wrapped__("cpu") == "not built: no compiler"
        assert native.load.__wrapped__("cuda").startswith("built, but it does not load")
        assert native.path("cpu") is None
    finally:
        native.build.cache_clear()


@pytest.mark.parametrize(("driver", "missing"), [(0, False), (12080, True), (13000, False), (14010, False)])
def test_driver_older_than_the_runtime(monkeypatch: pytest.MonkeyPatch, driver: int, missing: bool) -> None:
    monkeypatch.setattr(native, "cuda_versions", lambda: (13000, driver))
    reason = native._driver_reason()
    assert (reason is not None) == missing
    assert reason is None or "CUDA 13.0" in reason and "up to 12.8" in reason


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").touch()
    ignore = shutil.ignore_patterns("*.so", "_build_info.py", "__pycache__")
    for name in ("auglocal_ext", "csrc"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    return tmp_path


def build(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "setup.py", "build"],
        cwd=folder,
        env={**os.environ, "AUGLOCAL_FORCE_EXT": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_without_compilers_the_package_is_complete(copy: Path) -> None:
    tools = {"CC": "/bin/false", "CXX": "/bin/false", "CUDA_HOME": str(copy / "absent")}
    done = build(copy, **tools)
    assert done.returncode == 0, done.stdout + done.stderr
    (info,) = copy.glob("build/lib*/auglocal_ext/_build_info.py")
    libraries = native._read_info(info)["libraries"]
    assert not libraries["cpu"]["built"] and "the build failed" in libraries["cpu"]["reason"]
    assert not libraries["cuda"]["built"] and "holds no CUDA toolkit" in libraries["cuda"]["reason"]
    assert not libraries["nodes"]["built"] and "the build failed" in libraries["nodes"]["reason"]
    assert not list(copy.rglob("*.so")) and not (copy / "auglocal_ext" / "_build_info.py").exists()
    assert build(copy, **{**tools, "AUGLOCAL_FORCE_EXT": "1"}).returncode != 0


@pytest.mark.slow
def test_source_distribution_is_complete(copy: Path) -> None:
    for name in ("MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "setup.py", "-q", "sdist"]
    subprocess.run(command, cwd=copy, capture_output=True, check=True)
    (archive,) = copy.glob("dist/*.tar.gz")
    with tarfile.open(archive) as tar:
        packed = {Path(*Path(name).parts[1:]) for name in tar.getnames()}
    for folder in ("auglocal_ext", "csrc"):
        files = {path.relative_to(copy) for path in (copy / folder).rglob("*") if path.is_file()}
        wanted = {path for path in files if "__pycache__" not in path.parts}
        assert wanted and wanted <= packed


# Compilers that note what they compile. The second stands for nvcc and makes host code of it.
CXX = """#!/bin/sh
for last; do case "$last" in *.cpp) echo "${last##*csrc/}" >>"$COMPILED" ;; esac; done
exec c++ "$@"
"""
NVCC = """#!{python}
import os, shlex, subprocess, sys
arguments = sys.argv[1:]
if "--dryrun" in arguments:
    print("#$ TOP={root}", file=sys.stderr)
elif "--version" in arguments:
    print("release 13.0, build", os.environ["NVCC_BUILD"])
elif "--list-gpu-arch" in arguments:
    print("compute_80", "compute_90", "compute_100", sep=chr(10))
else:
    (source,) = [argument for argument in arguments if argument.endswith(".cu")]
    open(os.environ["COMPILED"], "a").write(source.split("csrc/")[-1] + chr(10))
    host = [argument.removeprefix("-Xcompiler=") for argument in arguments if argument.startswith("-Xcompiler=")]
    target = arguments[arguments.index("-o") + 1]
    command = ["c++", "-fPIC", *shlex.split(" ".join(host)), "-x", "c++", "-c", source, "-o", target]
    sys.exit(subprocess.call(command))
"""


@pytest.fixture
def small(copy: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source folder with a line for each source, two of which include a header, and compilers that keep a log."""
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    for header in copy.glob("csrc/**/*.h"):
        header.unlink()
    (copy / "csrc" / "near.h").write_text("inline const char* near() { return __FILE__; }\n")
    for source in (*copy.glob("csrc/[cn]*/*.cpp"), *copy.glob("csrc/cuda/*.cu")):
        near = source.stem == "similarity_loss"
        include, value = ('#include "../near.h"\n', "near()") if near else ("", f'"{source.name}" __FILE__')
        source.write_text(f"{include}const char* {source.stem}() {{ return {value}; }}\n")
    tools = tmp_path_factory.mktemp("tools")
    (tools / "include").mkdir()
    (tools / "include" / "cuda_runtime.h").touch()
    (tools / "lib64").mkdir()
    (tools / "lib64" / "libcudart_static.a").write_text("!<arch>\n")
    for name, text in (("cxx", CXX), ("nvcc", NVCC.format(python=sys.executable, root=tools))):
        executable(tools / "bin" / name, "").write_text(text)
    monkeypatch.setenv("CUDA_HOME", str(tools))
    monkeypatch.setenv("CXX", str(tools / "bin" / "cxx"))
    monkeypatch.setenv("COMPILED", str(tools / "compiled"))
    monkeypatch.setenv("NVCC_BUILD", "1")
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    return copy


NODES = f"_C_nodes{sysconfig.get_config_var('EXT_SUFFIX')}"


def compiled() -> set[str]:
    """What was compiled since this was asked last."""
    log = Path(os.environ["COMPILED"])
    names = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    assert len(names) == len(set(names))
    return set(names)


def libraries_of(folder: Path) -> dict[str, Any]:
    (info,) = folder.glob("build/lib*/auglocal_ext/_build_info.py")
    return native._read_info(info)["libraries"]


@pytest.mark.slow
def test_one_library_failing_leaves_the_other(small: Path) -> None:
    source = small / "csrc" / "cpu" / "pooled_cross_entropy.cpp"
    right = source.read_text()
    source.write_text("#error no such luck\n")
    done = build(small, CUDA_HOME=str(small / "absent"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "csrc/cpu/pooled_cross_entropy.cpp:1:2: error: #error no such luck" in libraries_of(small)["cpu"]["reason"]
    assert [p.name for p in small.rglob("*.so")] == [NODES]
    source.write_text(right)
    done = build(small, CUDA_HOME=str(small / "absent"))
    libraries = libraries_of(small)
    assert libraries["cpu"] == {"built": True, "reason": ""} and not libraries["cuda"]["built"], done.stdout
    assert sorted(p.name for p in small.rglob("*.so")) == ["_C_cpu.abi3.so", NODES]


@pytest.mark.slow
def test_what_has_not_changed_is_not_compiled_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = {f"{path.parent.name}/{path.name}" for path in small.glob("csrc/[cn]*/*.cpp")}
    cuda = {f"cuda/{path.name}" for path in small.glob("csrc/cuda/*.cu")}
    done = build(small)
    assert compiled() == cpu | cuda, done.stdout + done.stderr
    files = len(cuda)
    assert f"auglocal_ext: compiling {files} CUDA files for " in done.stdout
    assert f"({files - 1} of {files} done)" in done.stdout
    first = libraries_of(small)
    assert first["cuda"]["built"] and first["cuda"]["nvcc"] == "13.0"
    for library in small.glob("build/lib*/auglocal_ext/*.abi3.so"):
        content = library.read_bytes()
        assert b"csrc/cpu/../near.h" in content or b"csrc/cuda/../near.h" in content
        assert str(small).encode() not in content

    # Elsewhere, with a header changed that two include, and an object damaged.
    elsewhere = small.rename(small.parent / "else where")
    (elsewhere / "csrc" / "near.h").write_text("inline const char* near() { return __FILE__ __FILE__; }\n")
    (damaged,) = [p for p in elsewhere.glob("build/objects/*") if b"versions.cu" in p.read_bytes()]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    done = build(elsewhere)
    assert compiled() == {"cpu/similarity_loss.cpp", "cuda/similarity_loss.cu", "cuda/versions.cu"}, done.stdout
    assert libraries_of(elsewhere) == first
    assert len(list(elsewhere.glob("build/lib*/auglocal_ext/*.so"))) == 3

    source = elsewhere / "csrc" / "cuda" / "versions.cu"
    right = source.read_text()
    source.write_text("#error no such luck\n")
    assert build(elsewhere).returncode == 0 and compiled() == {"cuda/versions.cu"}
    failed = libraries_of(elsewhere)
    assert failed["cpu"]["built"] and not failed["cuda"]["built"]
    assert "csrc/cuda/versions.cu:1:2: error: #error no such luck" in failed["cuda"]["reason"]
    assert str(elsewhere) not in failed["cuda"]["reason"]
    libraries = sorted(path.name for path in elsewhere.glob("build/lib*/auglocal_ext/*.so"))
    assert libraries == ["_C_cpu.abi3.so", NODES]

    source.write_text(right)
    monkeypatch.setenv("NVCC_BUILD", "2")
    build(elsewhere)
    assert compiled() == cuda and libraries_of(elsewhere) == first


def test_headers_define_each_name_once():
    """Several sources become one library, where two types of one name are one symbol for the linker."""
    csrc = Path(__file__).resolve().parents[1] / "csrc"
    owner: dict[str, str] = {}
    for header in sorted(csrc.rglob("*.h")):
        for name in re.findall(r"^struct (?:alignas\(.*\) )?(\w+) {", header.read_text(), flags=re.M):
            assert owner.setdefault(name, header.name) == header.name, f"{name} is in {owner[name]} and {header.name}"
    assert {"FeatureMap", "PooledProblem", "BatchNormProblem", "MaxPoolProblem"} <= set(owner)

"""The build and its libraries: symbols, the discovery of the toolkit, the record, the refusal of a stale build."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
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
def test_reason_is_there_where_the_library_is_not(name: str) -> None:
    reason = native.reason(name)
    assert reason is None or (len(reason) > 10 and "\n" not in reason.strip())


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IEXEC)
    return path


def fake_toolkit(root: Path, architectures: str = "compute_75 compute_90 compute_100") -> Path:
    (root / "include").mkdir(parents=True)
    (root / "include" / "cuda_runtime.h").touch()
    return executable(
        root / "bin" / "nvcc",
        f'[ "$1" = --dryrun ] && echo "#\\$ TOP={root}/bin/.." >&2\n'
        f'[ "$1" = --list-gpu-arch ] && printf "%s\\n" {architectures}\nexit 0\n',
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
    assert setup_py.find_toolkit() == (tmp_path / "one").resolve()


def test_nvcc_on_path_may_be_a_wrapper(setup_py: ModuleType, bare: Path, tmp_path: Path) -> None:
    real = fake_toolkit(tmp_path / "toolkit")
    executable(bare / "nvcc", f'exec {real} "$@"\n')
    assert setup_py.find_toolkit() == (tmp_path / "toolkit").resolve()


def test_wrong_cuda_home_is_explained(setup_py: ModuleType, bare: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "absent"))
    with pytest.raises(setup_py.NotBuilt, match="absent holds no CUDA toolkit"):
        setup_py.find_toolkit()


def test_default_architectures_are_those_nvcc_knows(setup_py: ModuleType, tmp_path: Path) -> None:
    assert setup_py.default_architectures(fake_toolkit(tmp_path / "new")) == "9.0;10.0+PTX"
    with pytest.raises(setup_py.NotBuilt, match="knows none"):
        setup_py.default_architectures(fake_toolkit(tmp_path / "old", "compute_35"))


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
    assert not list(copy.rglob("*.so")) and not (copy / "auglocal_ext" / "_build_info.py").exists()
    assert build(copy, **{**tools, "AUGLOCAL_FORCE_EXT": "1"}).returncode != 0


@pytest.mark.slow
def test_one_library_failing_leaves_the_other(copy: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    done = build(copy, CUDA_HOME=str(copy / "absent"))
    assert done.returncode == 0, done.stdout + done.stderr
    (info,) = copy.glob("build/lib*/auglocal_ext/_build_info.py")
    libraries = native._read_info(info)["libraries"]
    assert libraries["cpu"] == {"built": True, "reason": ""} and not libraries["cuda"]["built"]
    assert [p.name for p in copy.rglob("*.so")] == ["_C_cpu.abi3.so"]


@pytest.mark.slow
def test_compiler_message_is_kept(copy: Path) -> None:
    if shutil.which("c++") is None:
        pytest.skip("needs a C++ compiler")
    (copy / "csrc" / "cpu" / "pooled_cross_entropy.cpp").write_text("#error no such luck\n")
    assert build(copy, CUDA_HOME=str(copy / "absent")).returncode == 0
    (info,) = copy.glob("build/lib*/auglocal_ext/_build_info.py")
    assert "no such luck" in native._read_info(info)["libraries"]["cpu"]["reason"]


def test_headers_define_each_name_once():
    """Several sources become one library, where two types of one name are one symbol for the linker."""
    csrc = Path(__file__).resolve().parents[1] / "csrc"
    owner: dict[str, str] = {}
    for header in sorted(csrc.rglob("*.h")):
        for name in re.findall(r"^struct (?:alignas\(.*\) )?(\w+) {", header.read_text(), flags=re.M):
            assert owner.setdefault(name, header.name) == header.name, f"{name} is in {owner[name]} and {header.name}"
    assert {"FeatureMap", "PooledProblem", "BatchNormProblem", "MaxPoolProblem"} <= set(owner)

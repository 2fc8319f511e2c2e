"""The GPU kernels without a GPU: Triton's in its interpreter, those of CUDA compiled for the host against an emulator.

Each in a process of its own, which runs the op's ordinary test: Triton chooses its interpreter when it is imported,
and the emulated library takes the place of the real one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from emulator import build

HERE = Path(__file__).resolve().parent


def run_cases(tests: Path, least: int, *options: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, str(tests)],
        env={**os.environ, **environment},
        cwd=HERE.parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed.group(1)) >= least, done.stdout[-1000:]


@pytest.mark.slow
def test_triton_kernels_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this run is in the interpreter already")
    run_cases(HERE, 90, "-k", "cpu-triton", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the plugin ``emulated`` finds the kernels."""
    pytest.importorskip("pybind11")
    if build.compiler() is None:
        pytest.skip("needs Linux and a C++ compiler")
    folder = tmp_path_factory.mktemp("emulator")
    build.build_runtime(folder)
    build.build_ops(folder)
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return {"PYTHONPATH": path, "AUGLOCAL_EMULATED": str(folder)}


@pytest.mark.slow
def test_cuda_kernels_on_the_emulator(emulator: dict[str, str]) -> None:
    """In every case, also those that the others leave out because pairs of parameters do not need them."""
    run_cases(HERE, 90, "-m", "not large", "-k", "cpu-cuda and not opcheck", "-p", "emulated", **emulator)


@pytest.mark.slow
def test_cuda_kernels_in_any_order(emulator: dict[str, str]) -> None:
    run_cases(HERE / "schedules.py", 4 * len(build.compiled_ops()), "-p", "emulated", **emulator)


@pytest.mark.slow
def test_under_address_sanitizer() -> None:
    pytest.importorskip("pybind11")
    if build.compiler() is None:
        pytest.skip("needs Linux and a C++ compiler")
    done = subprocess.run([sys.executable, str(HERE / "asan.py")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = [int(count) for count in re.findall(r"(\d+) passed", done.stdout)]
    assert len(passed) == 2 and min(passed) >= 90, done.stdout[-1000:]

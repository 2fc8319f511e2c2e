"""The GPU kernels without a GPU: Triton's in its interpreter, those of CUDA compiled for the host against an emulator.

Each in a process of its own, which runs the op's ordinary test: Triton chooses its interpreter when it is imported,
and the emulated library takes the place of the real one.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import emulated
import pytest

from auglocal_ext.ops import providers

HERE = Path(__file__).resolve().parent


def run_cases(cases: str, least: int, *options: str, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", cases, "-p", "no:cacheprovider", *options, str(HERE)],
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
    run_cases("cpu-triton", 90, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_cuda_kernels_on_the_emulator(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux") or shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("needs Linux and a C++ compiler")
    try:
        libraries = [str(emulated.build(op, tmp_path)) for op in providers.TABLES]
    except subprocess.CalledProcessError as error:
        pytest.fail(error.stderr[-4000:])
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    run_cases("cpu-cuda", 90, "-p", "emulated", PYTHONPATH=path, AUGLOCAL_EMULATED=os.pathsep.join(libraries))

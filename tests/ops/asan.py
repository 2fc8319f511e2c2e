"""The ops' tests with the cpu provider and the CUDA kernels on the emulator under AddressSanitizer.

    python tests/ops/asan.py [pytest options]

Both are compiled for it; torch is not, but its memory is watched all the same. Ends with pytest's status.
"""

from __future__ import annotations

import os
import pprint
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from emulator import build

HERE = Path(__file__).resolve().parent


def runtime_libraries() -> str:
    """What has to be loaded before Python: AddressSanitizer, and the library whose exceptions it watches."""
    names = ("libasan.so", "libstdc++.so")
    command = [build.compiler() or "c++"]
    paths = [subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True) for name in names]
    return " ".join(os.path.realpath(path.stdout.strip()) for path in paths)


def package(folder: Path) -> None:
    """The package with a cpu library that is compiled for AddressSanitizer, and without the other libraries."""
    copy = folder / "auglocal_ext"
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py")
    shutil.copytree(build.ROOT / "auglocal_ext", copy, ignore=ignored)
    library = build.build_cpu(copy / "_C_cpu.abi3.so", folder / "cpu", build.ADDRESS)
    assert b"__asan_report" in library.read_bytes(), "the compiler put no checks into the library"
    libraries = {
        "cpu": {"built": True, "reason": ""},
        "cuda": {"built": False, "reason": "it runs on the emulator"},
        "nodes": {"built": False, "reason": "nodes in Python call the same kernels"},
    }
    (copy / "_build_info.py").write_text(f"BUILD = {pprint.pformat({'libraries': libraries})}\n")


def run(folder: Path, command: list[str], **environment: str) -> int:
    """Run Python under AddressSanitizer, whose reports are printed; returns its status, which no report leaves 0."""
    reports = Path(tempfile.mkdtemp(dir=folder))
    variables = {
        "PYTHONPATH": os.pathsep.join([str(folder), str(HERE)]),
        "LD_PRELOAD": runtime_libraries(),
        # Python gives little back at its end. pytest keeps what is printed by a process that ends at once.
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={reports / 'report'}",
        **environment,
    }
    done = subprocess.run(
        [sys.executable, *command],
        **{"cwd": folder, "env": {**os.environ, **variables}, "text": True},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
    )
    print(done.stdout, *(report.read_text() for report in reports.iterdir()), sep="\n")
    return done.returncode


def main(options: list[str]) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build.build_runtime(folder, build.ADDRESS)
        tests = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(HERE), *options]
        with ThreadPoolExecutor(2) as pool:
            packaged = pool.submit(package, folder)
            build.build_ops(folder, build.ADDRESS)
            packaged.result()
            kernels = "not opcheck and not in_torch"  # which compile and trace, and take most of the time
            runs = [
                pool.submit(run, folder, [*tests, "-k", f"cpu-cpu and {kernels}"]),
                pool.submit(
                    run, folder, [*tests, "-k", f"cpu-cuda and {kernels}", "-p", "emulated"], AUGLOCAL_EMULATED=name
                ),
            ]
            return max(abs(done.result()) for done in runs)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

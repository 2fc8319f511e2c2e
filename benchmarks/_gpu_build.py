"""Do the libraries load and run on this GPU; if not, build them for it. Writes build.json.

    python benchmarks/_gpu_build.py --site DIR --output DIR --capability 9.0            # where the GPU is
    python benchmarks/_gpu_build.py --site DIR --output DIR --capability 9.0 --no-run   # before, on a machine without

Built is from a copy, into --site, which stands on PYTHONPATH behind this folder: the source folder may be read-only and
what is installed stays. Exit status 1 if the CUDA library cannot be used, with the reason.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from _resume import write_json

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("auglocal_ext", "csrc", "setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
BUILD_NEEDS = ("pip", "setuptools", "wheel", "ninja", "numpy", "torch")
TOLD = ("pytest", "hypothesis", "torchvision", "tensorboard", "scipy", "onnx", "onnxscript", "matplotlib", "tqdm")

# One small call of an op by its kernels, against torch; a library without code for this GPU fails here.
TRY = """
import json, torch
from auglocal_ext.ops import batch_norm_act
x = torch.randn(8, 16, 8, 8, device="cuda")
w, b = torch.rand(16, device="cuda"), torch.randn(16, device="cuda")
z = torch.relu(torch.nn.functional.batch_norm(x, None, None, w, b, True))
said = {}
for provider in ("triton", "cuda"):  # this one last: after an error of CUDA nothing else runs
    m, v = torch.zeros(16, device="cuda"), torch.ones(16, device="cuda")
    try:
        y = batch_norm_act(x, w, b, m, v, training=True, provider=provider)
        torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
        said[provider] = "ran"
    except Exception as error:
        said[provider] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
print(json.dumps(said))
"""


def info() -> dict[str, Any] | str:
    """What ``python -m auglocal_ext info`` says, or how it failed."""
    done = _run([sys.executable, "-m", "auglocal_ext", "info", "--json"])
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        return done.stderr[-2000:] or f"exit status {done.returncode}"


def obstacle(found: dict[str, Any] | str, capability: str | None) -> str | None:
    """Why the CUDA library of this build cannot be used, on a GPU of that capability where it is known."""
    if isinstance(found, str):
        return f"`python -m auglocal_ext info` failed: {found.strip().splitlines()[-1]}"
    cuda = found["providers"]["cuda"]
    if not cuda["available"]:
        return cuda["reason"]
    if (reason := cuda.get("devices", {}).get("cuda:0")) is not None:
        return reason
    built_for = cuda["targets"] if "targets" in cuda else cuda["architectures"].split(";")
    if capability is not None and not covers(built_for, capability):
        return f"built for {' '.join(built_for)}, the GPU is of compute capability {capability}"
    return None


def covers(built_for: Iterable[str], capability: str) -> bool:
    """Whether code for these targets runs on a GPU of that capability, by itself or out of its PTX.

    A target is named as nvcc does, ``sm_90`` or ``compute_90`` (PTX), or as torch does, ``9.0`` or ``9.0+PTX``.
    """
    major, minor = map(int, capability.split("."))
    for name in built_for:
        found = re.fullmatch(r"(sm_|compute_)?(\d+)\.?(\d)([af]?)(\+PTX)?", name.strip())
        if found is None:
            continue
        theirs = int(found[2]), int(found[3])
        if theirs == (major, minor):
            return True
        if found[1] != "compute_" and not found[4] and theirs[0] == major and theirs[1] < minor:
            return True  # machine code runs within its major version
        if (found[1] == "compute_" or found[5]) and not found[4] and theirs < (major, minor):
            return True
    return False


def build(site: Path, architectures: str) -> str | None:
    """Install this source folder's package into ``site``; why that failed, or None."""
    missing = [name for name in BUILD_NEEDS if _version(name) is None]
    if missing:
        return f"to build, {', '.join(missing)} must be installed; or give another machine's build as --site"
    shutil.rmtree(site, ignore_errors=True)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "source"
        copy.mkdir()
        for name in SOURCES:
            here = ROOT / name
            if here.is_dir():
                shutil.copytree(
                    here, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build_info.py")
                )
            elif here.exists():
                shutil.copy(here, copy / name)
        for path in (copy, *copy.rglob("*")):  # of a read-only folder
            path.chmod(path.stat().st_mode | 0o600 | (0o100 if path.is_dir() else 0))
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
        command += ["--no-cache-dir", "--disable-pip-version-check", "-v", "--target", str(site), str(copy)]
        done = _run(command, {"TORCH_CUDA_ARCH_LIST": architectures}, cwd=folder)
    print(done.stdout[-200_000:], done.stderr[-20_000:], sep="\n")
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip() or "without a word").splitlines()
        return f"pip install ended with status {done.returncode}: {lines[-1]}"
    return None


def _run(
    command: Sequence[str], more: dict[str, str] | None = None, cwd: str | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, env={**os.environ, **(more or {})}, cwd=cwd, capture_output=True, text=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def try_kernels() -> dict[str, str]:
    done = _run([sys.executable, "-c", TRY])
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        words = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        return {"cuda": words, "triton": words}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, required=True, help="folder of the build")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--capability", metavar="M.N", help="compute capability of the GPU")
    parser.add_argument("--no-build", action="store_true", help="say what is there")
    parser.add_argument("--no-run", action="store_true", help="call no kernel")
    options = parser.parse_args(arguments)

    start = time.monotonic()
    found = info()
    reason = obstacle(found, options.capability)
    record: dict[str, Any] = {"capability": options.capability, "packages": {name: _version(name) for name in TOLD}}
    print(f"before: {reason or 'the CUDA library can be used'}", flush=True)
    if reason and not options.no_build:
        architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or options.capability or ""
        record["built_because"], record["built_for"] = reason, architectures
        failed = build(options.site.resolve(), architectures)
        record["build_seconds"] = round(time.monotonic() - start, 1)
        found = info()
        reason = failed or obstacle(found, options.capability)
    record |= {"obstacle": reason, "info": found}
    if not options.no_run:
        record["runs"] = try_kernels()
        reason = reason or (None if record["runs"]["cuda"] == "ran" else record["runs"]["cuda"])
    write_json(options.output / "build.json", record)
    missing = [name for name, version in record["packages"].items() if version is None]
    if missing:
        print(f"not installed, and needed by some tests or commands: {', '.join(missing)}")
    print(f"kernels: {record.get('runs', 'not called')}")
    print(reason or "the CUDA library can be used")
    return 1 if reason else 0


if __name__ == "__main__":
    sys.exit(main())

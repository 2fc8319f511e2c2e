"""Everything that is owed to a GPU (benchmarks/results/OWED.md), in order of worth, in slices of some minutes.

    python benchmarks/gpu.py --output DIR --minutes 9              # again and again, until nothing is left
    python benchmarks/gpu.py --output DIR --data CIFAR --archive ARCHIVES
    python benchmarks/gpu.py --output DIR --only kernels step-     # tasks whose name contains one of these
    python benchmarks/gpu.py --output DIR --build-for 9.0          # before, on a machine without a GPU
    python benchmarks/gpu.py --output DIR --dry-run                # everything at tiny sizes on the CPU

DIR keeps what was done: state.json, summary.md and summary.json, results/ (the files to commit), logs/, work/ (what the
next slice goes on from), site/ (a build for this GPU, where the one that is installed does not fit). A task that fails
ends no other. ARCHIVES gets DIR as a few files of at most 15 MiB for each slice: unpacked into an empty DIR they let
another machine go on.

Exit status: 0 when nothing is left, 1 if nothing is left and a task failed, 130 if another slice would go on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _gpu_archive import write_archives
from _gpu_slices import DONE, LEFT_OUT, Slices, Task
from _gpu_tasks import Place, script, tasks
from _resume import INTERRUPTED

ROOT = Path(__file__).resolve().parents[1]

LOOK = """
import json, torch
found = {"torch": torch.__version__, "cuda": torch.version.cuda, "gpu": None}
if torch.cuda.is_available():
    torch.cuda.synchronize()
    found |= {"gpu": torch.cuda.get_device_name(), "capability": "%d.%d" % torch.cuda.get_device_capability()}
print(json.dumps(found))
"""

# What would make of a measurement something else than it says.
UNSET = ("AUGLOCAL_PROVIDER", "TRITON_INTERPRET", "CUDA_LAUNCH_BLOCKING", "PYTORCH_NO_CUDA_MEMORY_CACHING")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/gpu"), metavar="DIR", help="default runs/gpu")
    add("--minutes", type=float, default=9.0, metavar="M", help="of this slice (default 9), all included")
    add("--data", type=Path, metavar="DIR", help="CIFAR-10, as `train --data` takes it; without it no accuracy")
    add("--only", nargs="+", metavar="TEXT", help="only tasks whose name contains one of these")
    add("--again", nargs="+", metavar="TEXT", help="forget what came of these tasks, and run them")
    add("--archive", type=Path, metavar="DIR", help="folder for the archives of this slice")
    add("--build-for", metavar="M.N", help="build into DIR/site for GPUs of that compute capability, and stop")
    add("--list", action="store_true", help="name the tasks and what came of them, and stop")
    add("--dry-run", action="store_true", help="tiny sizes on the CPU: does the script itself work")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive, got {options.minutes:g}")
    if options.data is not None and not options.data.is_dir():
        parser.error(f"--data {options.data}: no such folder")
    output = options.output.resolve()
    data = options.data.resolve() if options.data else None
    if options.list:
        print(listing(output, choose(parser, tasks(Place(output, data)), options.only)))
        return 0
    output.mkdir(parents=True, exist_ok=True)
    environment = make_environment(output, options.dry_run)
    if options.build_for:
        given = ["--site", str(output / "site"), "--output", str(output), "--capability", options.build_for]
        return subprocess.run(script("_gpu_build.py", *given, "--no-run"), env=environment).returncode

    machine = look(environment)
    known = tasks(Place(output, data, machine.get("capability"), options.dry_run))
    chosen = choose(parser, known, options.only)
    if (obstacle := refuse(machine, output, options.dry_run)) is not None:
        print(obstacle, file=sys.stderr)
        return 2
    if options.again:
        forget(output, choose(parser, chosen, options.again))

    def archive() -> None:
        if options.archive is not None:
            write_archives(output, options.archive, f"slice-{len(slices.state['slices'])}")

    slices = Slices(known, output, machine, environment, archive, chosen)
    slices.run(60 * options.minutes - (time.monotonic() - start))
    print("\n" + slices.summary())
    left = [task for task in slices.left if slices.entry(task)["status"] != LEFT_OUT]
    if left:
        print(f"{len(left)} of {len(chosen)} tasks are left: the same command goes on")
        return INTERRUPTED
    return 1 if any(slices.entry(task)["status"] not in (DONE, LEFT_OUT) for task in chosen) else 0


def choose(parser: argparse.ArgumentParser, known: Sequence[Task], wanted: Sequence[str] | None) -> list[Task]:
    """Those named, and what looks at the machine."""
    if wanted is None:
        return list(known)
    for text in wanted:
        if not any(text in task.name for task in known):
            parser.error(f"{text!r} is in no task's name: {', '.join(task.name for task in known)}")
    return [task for task in known if task.always or any(text in task.name for text in wanted)]


def listing(output: Path, chosen: Sequence[Task]) -> str:
    path = output / "state.json"
    known = json.loads(path.read_text())["tasks"] if path.exists() else {}
    lines = [
        f"{task.name:20} {known.get(task.name, {}).get('status', 'left'):9} {task.wanted} "
        f"({', '.join(task.results.values())})"
        for task in chosen
    ]
    return "\n".join(lines)


def make_environment(output: Path, dry: bool) -> dict[str, str]:
    """Of every process: this package first, then a build for this GPU; caches where they may be written."""
    found = {name: value for name, value in os.environ.items() if name not in UNSET}
    for name in UNSET:
        if name in os.environ:
            print(f"{name} is set, and left out here", file=sys.stderr)
    cache = output / "cache"
    paths = [str(ROOT), str(output / "site"), found.get("PYTHONPATH")]
    found |= {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "MPLBACKEND": "Agg",
        "MPLCONFIGDIR": str(cache / "matplotlib"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(cache / "hypothesis"),
    }
    if dry:
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def look(environment: dict[str, str]) -> dict[str, Any]:
    """GPU, its compute capability and torch, as a process of its own sees them; this one must hold no GPU memory."""
    done = subprocess.run([sys.executable, "-c", LOOK], env=environment, capture_output=True, text=True)
    try:
        return json.loads(done.stdout)
    except json.JSONDecodeError:
        words = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        return {"gpu": None, "error": f"{sys.executable} cannot use torch: {words}"}


def refuse(machine: dict[str, Any], output: Path, dry: bool) -> str | None:
    """Why nothing is run on this machine into this folder, or None."""
    if "error" in machine:
        return machine["error"]
    if not dry and machine["gpu"] is None:
        built = f"was built for CUDA {machine['cuda']}" if machine["cuda"] else "was built without CUDA"
        return (
            f"torch {machine['torch']} of {sys.executable} sees no GPU (it {built}; see nvidia-smi). "
            "--dry-run tries everything on the CPU, --build-for builds for another machine"
        )
    path = output / "state.json"
    earlier = json.loads(path.read_text())["slices"] if path.exists() else []
    other = {entry["gpu"] for entry in earlier} - {machine["gpu"]}
    if other:
        theirs, ours = (f"a {gpu}" if gpu else "a dry run" for gpu in (other.pop(), machine["gpu"]))
        return f"{output} holds results of {theirs}, this is {ours}: give another --output"
    return None


def forget(output: Path, again: Sequence[Task]) -> None:
    path = output / "state.json"
    state = json.loads(path.read_text()) if path.exists() else {"slices": [], "tasks": {}}
    for task in again:
        state["tasks"].pop(task.name, None)
        shutil.rmtree(output / "work" / task.name, ignore_errors=True)
    path.write_text(json.dumps(state, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())

"""The runs of ``benchmarks/accuracy.py``: each a process and a folder, skipped if done and taken up if interrupted."""

from __future__ import annotations

import csv
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from tqdm import tqdm

import auglocal_ext
from auglocal_ext.training.run.trainer import CHECKPOINT

STATE = "run.json"
OUTPUT = "train.txt"
INTERRUPTED = 130
POLL_SECONDS = 0.2

ROOT = Path(__file__).resolve().parents[1]


def file_name(row: str) -> str:
    """A row's name as part of a folder's."""
    return row.lower().replace(" + ", "+").replace(" ", "-").replace("=", "")


class OtherRunError(Exception):
    """A folder holds another run than the one that was to be made in it; the message says what to do."""


@dataclass(frozen=True)
class Run:
    """One training run: its place in the tables, its options of ``train``, and its folder.

    ``settings`` are those options that all rows have in common; ``data`` tells one data set from another.
    """

    network: str
    row: str
    epochs: int
    seed: int
    settings: str
    rule: str
    device: str
    data: dict[str, Any]
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.network}, {self.row}, seed {self.seed}"

    @property
    def options(self) -> str:
        """What ``train`` is told but for its folders."""
        return (
            f"--network {self.network} {self.rule} --epochs {self.epochs} --seed {self.seed} "
            f"--device {self.device} {self.settings}"
        ).strip()

    def identity(self) -> dict[str, Any]:
        """What a folder must agree on to hold this run."""
        return {
            "network": self.network,
            "row": self.row,
            "epochs": self.epochs,
            "seed": self.seed,
            "settings": self.settings,
            "device": self.device,
            "options": self.options,
            "data": self.data,
        }

    def command(self, data: Path) -> list[str]:
        resume = ["--resume"] if (self.folder / CHECKPOINT).exists() else []
        folders = ["--data", str(data.resolve()), "--output", str(self.folder.resolve())]
        return [sys.executable, "-m", "auglocal_ext", "train", *folders, *shlex.split(self.options), *resume]


def read_state(folder: Path) -> dict[str, Any] | None:
    """What is known of the run in a folder: its identity, ``status``, ``error`` and ``sittings``; None without one."""
    try:
        return json.loads((folder / STATE).read_text())
    except FileNotFoundError:
        return None


def status_of(run: Run) -> str:
    """``"new"``, ``"done"``, ``"failed"`` or ``"interrupted"``; OtherRunError if the folder holds another run."""
    state = read_state(run.folder)
    if state is None:
        if (run.folder / CHECKPOINT).exists():
            raise OtherRunError(
                f"{run.folder} holds a run that this benchmark did not make: give another --output, or move it away"
            )
        return "new"
    changed = [name for name, value in run.identity().items() if state.get(name) != value]
    if changed:
        lines = [f"  {name}: {state.get(name)!r} there, now {run.identity()[name]!r}" for name in changed]
        raise OtherRunError(
            f"{run.folder} holds a run with other settings:\n"
            + "\n".join(lines)
            + "\ngive another --output, or delete that folder to train the run anew"
        )
    return state["status"]


def epochs_done(folder: Path) -> int:
    """Finished epochs of a run, by its log."""
    try:
        with (folder / "log.csv").open(newline="") as file:
            return sum(1 for _ in csv.reader(file)) - 1
    except FileNotFoundError:
        return 0


class StopRequest:
    """While entered, SIGINT and SIGTERM set ``count`` to how many of them came instead of ending this process."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __enter__(self) -> StopRequest:
        self.count = 0
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def _handle(self, *_: object) -> None:
        self.count += 1


class _Sitting:
    """A run's process, in a session of its own: the terminal's Ctrl-C must reach it once, through this benchmark."""

    def __init__(self, run: Run, data: Path, jobs: int):
        self.run = run
        self._state = read_state(run.folder) or {**run.identity(), "sittings": []}
        self._start, self._jobs = time.perf_counter(), jobs
        run.folder.mkdir(parents=True, exist_ok=True)
        self._save("interrupted")  # what it is until it ends, should this process not see that
        with (run.folder / OUTPUT).open("ab") as file:
            self._process = subprocess.Popen(
                run.command(data),
                cwd=run.folder,
                env=_process_environment(jobs),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def stop(self, at_once: bool = False) -> None:
        """Have it save and end, or end at once."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM if at_once else signal.SIGINT)

    def ended(self) -> bool:
        return self._process.poll() is not None

    def finish(self, stopped: bool) -> str:
        """Note down how it ended; returns the status."""
        status = self._process.returncode
        outcome = "done" if status == 0 else "interrupted" if stopped or status == INTERRUPTED else "failed"
        about = environment()
        self._state["sittings"].append(
            {
                "date": about["date"],
                "commit": about["commit"],
                "machine": about["machine"],
                "runs_at_a_time": self._jobs,
                "load_average": os.getloadavg()[0],
                "wall_seconds": time.perf_counter() - self._start,
            }
        )
        self._save(outcome, self._error(status) if outcome == "failed" else None)
        return outcome

    def _error(self, status: int) -> str:
        """The message the process ended with, without the folders of this machine."""
        lines = (self.run.folder / OUTPUT).read_text(errors="replace").strip().splitlines()
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        message = (said or lines or ["without a word"])[-1]
        return f"{message.replace(str(self.run.folder.resolve()), 'OUTPUT')} (exit status {status})"

    def _save(self, status: str, error: str | None = None) -> None:
        self._state |= {"status": status, "error": error}
        temporary = self.run.folder / f"{STATE}.partial"
        temporary.write_text(json.dumps(self._state, indent=1) + "\n")
        os.replace(temporary, self.run.folder / STATE)


def _process_environment(jobs: int) -> dict[str, str]:
    """The cores are shared out, and the package is the one this process uses."""
    found = dict(os.environ)
    if jobs > 1:
        found.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // jobs)))
    if Path(auglocal_ext.__file__).is_relative_to(ROOT):  # a checkout, perhaps not installed
        found["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), found.get("PYTHONPATH")]))
    return found


def run_all(
    runs: Sequence[Run],
    data: Path,
    *,
    jobs: int,
    seconds: float,
    after: Callable[[Run, str], None],
) -> None:
    """Make the runs in order, ``jobs`` at a time.

    After ``seconds``, and at Ctrl-C, the runs in progress save and end and no other begins; a second Ctrl-C ends them
    without saving. ``after`` is called with each run that ended and its status.
    """
    deadline = time.monotonic() + seconds
    waiting, active, told = deque(runs), list[_Sitting](), 0
    with StopRequest() as stop, _Progress(runs) as progress:
        try:
            while active or (waiting and not stop.count):
                if not stop.count and time.monotonic() > deadline:
                    stop.count = 1
                while waiting and len(active) < jobs and not stop.count:
                    active.append(_Sitting(waiting.popleft(), data, jobs))
                if stop.count > told:
                    told = stop.count
                    progress.say("stopping at once" if told > 1 else STOPPING)
                    for sitting in active:
                        sitting.stop(at_once=told > 1)
                for sitting in [sitting for sitting in active if sitting.ended()]:
                    active.remove(sitting)
                    after(sitting.run, sitting.finish(stopped=told > 0))
                progress.show([sitting.run for sitting in active])
                time.sleep(POLL_SECONDS)
        finally:
            for sitting in active:  # an error here must not leave processes behind
                sitting.stop()


STOPPING = "stopping: each run saves after its step and ends (Ctrl-C again: at once, without saving)"


class _Progress:
    """A bar over all epochs, and what is run; silent where standard error is no terminal."""

    def __init__(self, runs: Sequence[Run]):
        self._runs = runs
        self._bar = tqdm(total=sum(run.epochs for run in runs), unit="epoch", leave=False, disable=None)
        self._shown = 0.0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stderr)

    def show(self, active: Sequence[Run]) -> None:
        if self._bar.disable or time.monotonic() - self._shown < 2:
            return
        self._shown = time.monotonic()
        self._bar.set_description("; ".join(run.name for run in active), refresh=False)
        self._bar.n = sum(epochs_done(run.folder) for run in self._runs)
        self._bar.refresh()

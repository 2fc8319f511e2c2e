"""Tasks in slices of time: what ran is kept in a state file, and the next slice goes on from there.

A task is a process with a time limit. It ends with status 0 when it is done and with 130 when it would go on, given
again; any other status is a failure, which ends no other task. What had to be stopped and does not go on where it was,
or was under way when this process was killed, comes after all others the next time, and is given up after some tries.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _resume import INTERRUPTED, write_json, write_text

LEFT, RUNNING, DONE, FAILED = "left", "running", "done", "failed"
CUT, STOPPED, LEFT_OUT = "cut off", "stopped", "left out"
GRACE = 15.0  # seconds a process has to end after it was asked to
RESERVE = 5.0  # seconds at the end of a slice for the summary and the archive
MOST_SITTINGS, MOST_STOPS = 20, 2
LOG_BYTES = 1 << 21


@dataclass(frozen=True)
class Task:
    """One piece of what is to be done.

    Args:
        name: of its log and of its folder below ``work``.
        wanted: what is to come of it, in a few words.
        command: the process to start, for the seconds it has.
        seconds: the most it gets at a time; then others have their turn.
        least: seconds without which it is not begun.
        results: pattern of a file in its folder -> name under which it is kept.
        missing: why it cannot be run here, or None.
        resumes: given again it goes on where it was stopped.
        always: in every slice, whatever came of it before: it looks at the machine.
        environment: variables of its process, besides those of all.
    """

    name: str
    wanted: str
    command: Callable[[float], Sequence[str]]
    seconds: float = 300.0
    least: float = 60.0
    results: Mapping[str, str] = field(default_factory=dict)
    missing: Callable[[], str | None] = lambda: None
    resumes: bool = False
    always: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)


class Slices:
    """The tasks with their states below ``output``; ``run`` is one slice, of the ``chosen`` ones.

    ``after`` is called whenever something has been written.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        output: Path,
        machine: Mapping[str, Any],
        environment: Mapping[str, str],
        after: Callable[[], None] = lambda: None,
        chosen: Sequence[Task] | None = None,
    ) -> None:
        self.chosen = tasks if chosen is None else chosen
        self.tasks, self.output, self._environment, self._after = tasks, output, environment, after
        self._path = output / "state.json"
        self.state: dict[str, Any] = {"slices": [], "tasks": {}}
        if self._path.exists():
            self.state = json.loads(self._path.read_text())
        for task in tasks:
            entry = self.entry(task)
            if entry["status"] == RUNNING:  # nobody saw its end
                entry.update(status=STOPPED, note="the slice was killed while it ran", stops=entry["stops"] + 1)
                self._keep_results(task)
        self.state["slices"].append({"started": time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime()), **machine})
        self._asked = 0

    def entry(self, task: Task) -> dict[str, Any]:
        new = {"status": LEFT, "note": "", "seconds": 0.0, "sittings": [], "stops": 0, "results": []}
        return self.state["tasks"].setdefault(task.name, new)

    def run(self, seconds: float) -> None:
        """One slice; what a signal ends is cut off, and then nothing else is begun."""
        deadline = time.monotonic() + seconds - RESERVE
        before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        ran: set[str] = set()
        try:
            while not self._asked and (task := self._next(deadline, ran) or self._again(deadline, ran)) is not None:
                ran.add(task.name)
                self._sit(task, deadline)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self.write()

    @property
    def left(self) -> list[Task]:
        """Tasks that another slice would go on with."""
        return [task for task in self.chosen if self._is_open(task)]

    def _is_open(self, task: Task) -> bool:
        entry = self.entry(task)
        if entry["status"] == STOPPED:
            return entry["stops"] < MOST_STOPS
        return entry["status"] in (LEFT, LEFT_OUT) or (
            entry["status"] == CUT and len(entry["sittings"]) < MOST_SITTINGS
        )

    def _next(self, deadline: float, ran: set[str]) -> Task | None:
        left = deadline - time.monotonic() - GRACE
        waiting = [task for task in self.chosen if (task.always or self._is_open(task)) and task.name not in ran]
        for task in sorted(waiting, key=lambda task: self.entry(task)["status"] == STOPPED and not task.always):
            entry = self.entry(task)
            if (reason := task.missing()) is not None:
                entry.update(status=LEFT_OUT, note=reason)
            elif left >= task.least:
                return task
        return None

    def _again(self, deadline: float, ran: set[str]) -> Task | None:
        """Once all have had their turn: one that would go on, if its time was short and not what it needs next."""
        for task in self.chosen:
            entry = self.entry(task)
            if entry["status"] == CUT and entry["sittings"][-1]["seconds"] > entry["sittings"][-1]["limit"] / 2:
                ran.discard(task.name)
        return self._next(deadline, ran)

    def _sit(self, task: Task, deadline: float) -> None:
        entry = self.entry(task)
        limit = min(task.seconds, deadline - time.monotonic() - GRACE)
        entry.update(status=RUNNING, note="")
        self.write()
        start = time.monotonic()
        status, stopped = self._process(task, limit)
        seconds = round(time.monotonic() - start, 1)
        sitting = {"slice": len(self.state["slices"]), "seconds": seconds, "limit": round(limit, 1), "exit": status}
        entry["sittings"].append(sitting)
        entry["seconds"] = round(entry["seconds"] + sitting["seconds"], 1)
        if status == 0:
            entry.update(status=DONE)
        elif status == INTERRUPTED or (stopped and task.resumes and status != -signal.SIGKILL):
            entry.update(status=CUT, note="goes on in the next slice")
        elif stopped:
            entry.update(status=STOPPED, note=f"not done after {limit:.0f} s", stops=entry["stops"] + 1)
        else:
            entry.update(status=FAILED, note=f"exit status {status}: {self._last_words(task)}")
        self._keep_results(task)
        self.write()
        print(f"{task.name}: {entry['status']}, {sitting['seconds']:.0f} s. {entry['note']}".rstrip(), flush=True)

    def _process(self, task: Task, limit: float) -> tuple[int, bool]:
        """Exit status, and whether it had to be asked to end."""
        folder, log = self.output / "work" / task.name, self.output / "logs" / f"{task.name}.txt"
        for path in (folder, log.parent):
            path.mkdir(parents=True, exist_ok=True)
        command = list(task.command(limit))
        with log.open("ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            try:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env={**self._environment, **task.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    preexec_fn=os.setpgrp,  # a process group of its own can be signalled
                )
            except OSError as error:
                file.write(f"{error}\n".encode())
                return 127, False
            stopped = not _wait(process, limit, lambda: self._asked)
            if stopped:
                _signal(process, signal.SIGINT)
                if not _wait(process, GRACE, lambda: self._asked > 1):
                    _signal(process, signal.SIGKILL)
                    process.wait()
        _shorten(log)
        return process.returncode, stopped

    def _ask(self, *_: object) -> None:
        self._asked += 1

    def _last_words(self, task: Task) -> str:
        lines = (self.output / "logs" / f"{task.name}.txt").read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else "without a word"

    def _keep_results(self, task: Task) -> None:
        kept = self.output / "results"
        for pattern, name in task.results.items():
            for path in (self.output / "work" / task.name).glob(pattern):
                kept.mkdir(parents=True, exist_ok=True)
                partial = kept / f"{name}.partial"
                partial.write_bytes(path.read_bytes())
                os.replace(partial, kept / name)
        self.entry(task)["results"] = [name for name in task.results.values() if (kept / name).exists()]

    def write(self) -> None:
        """State and summaries, whole or not at all."""
        write_json(self._path, self.state)
        tasks = [{"name": task.name, "wanted": task.wanted, **self.entry(task)} for task in self.tasks]
        write_json(self.output / "summary.json", {"slices": self.state["slices"], "tasks": tasks})
        write_text(self.output / "summary.md", self.summary())
        self._after()

    def summary(self) -> str:
        machine = self.state["slices"][-1]
        lines = [
            "# What was measured",
            "",
            f"{len(self.state['slices'])} slices; the last: {', '.join(f'{k} {v}' for k, v in machine.items())}.",
            "",
            "| task | status | seconds | result files | note |",
            "|---|---|---|---|---|",
        ]
        for task in self.tasks:
            entry = self.entry(task)
            cells = [task.name, entry["status"], f"{entry['seconds']:.0f}", ", ".join(entry["results"]), entry["note"]]
            lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
        return "\n".join(lines) + "\n"


def _wait(process: subprocess.Popen[bytes], seconds: float, asked: Callable[[], Any]) -> bool:
    """Whether it ended by itself within the time, and before somebody asked."""
    end = time.monotonic() + seconds
    while process.poll() is None:
        if time.monotonic() > end or asked():
            return False
        time.sleep(0.05)
    return True


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    """To the process and all it has started, but for groups of their own."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def _shorten(log: Path) -> None:
    """Beginning and end of a log that has grown too long to be sent anywhere."""
    size = log.stat().st_size
    if size > LOG_BYTES:
        with log.open("rb") as file:
            head = file.read(LOG_BYTES // 4)
            file.seek(size - LOG_BYTES // 2)
            tail = file.read()
        log.write_bytes(head + f"\n... {size - len(head) - len(tail)} bytes left out ...\n".encode() + tail)

"""How far the compilers are and how long they will take, roughly. Standard library alone."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Seconds of one core for a file, on average over ours, and for each architecture of it: GCC 12 and nvcc 13.0, with
# PTX beside the machine code, which adds nothing.
SECONDS = {".cpp": (11.0, 0.0), ".cu": (5.0, 5.0)}
LANGUAGES = {".cpp": "C++", ".cu": "CUDA"}
WORTH_A_WORD = 20  # seconds


class Progress:
    """Lines about the compilation of ``sources``; ``for_what`` names the architectures, ``""`` where there are none."""

    def __init__(self, sources: Sequence[str], for_what: str, say: Callable[[str], None]) -> None:
        self.total, self.say = len(sources), say
        self.cores = cores()
        for_what = for_what.replace(";", " ")
        suffix = Path(sources[0]).suffix
        file, architecture = SECONDS[suffix]
        self.each = file + architecture * len(for_what.split())
        files = f"{LANGUAGES[suffix]} file" + ("s" if self.total > 1 else "")
        self.what = f"{self.total} {files}" + (f" for {for_what}" if for_what else "")

    def line(self, done: int) -> str:
        """``auglocal_ext: compiling 7 CUDA files for 8.0 9.0+PTX, about 2 minutes on 2 cores (3 of 7 done)``."""
        left = self.seconds(self.total - done)
        time = f"about {in_words(left)} {'left ' if done else ''}on {self.cores} core{'s' * (self.cores > 1)}"
        return f"auglocal_ext: compiling {self.what}, {time} ({done} of {self.total} done)"

    def seconds(self, files: int) -> float:
        """Estimate for as many files."""
        # Two at least, because the longest takes about twice as long as the average.
        return self.each * max(files / self.cores, min(files, 2))

    def start(self) -> None:
        """The first line, also on the terminal where it will take a while."""
        self.say(self.line(0))
        if self.seconds(self.total) > WORTH_A_WORD:
            on_terminal(f"{self.line(0).rpartition(' (')[0]}; `pip install -v` shows more")

    @contextlib.contextmanager
    def watched(self, log: Path, finished: Callable[[str], None]) -> Iterator[None]:
        """While ninja runs, a line for each object that its log names; ``finished`` gets the object's file."""
        seen: set[str] = set()
        ended = threading.Event()

        def look() -> None:
            for file in outputs(log):
                if file not in seen:
                    seen.add(file)
                    finished(file)
                    if len(seen) < self.total:
                        self.say(self.line(len(seen)))

        def watch() -> None:
            while not ended.wait(0.5):
                look()

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            look()


def outputs(log: Path) -> list[str]:
    """Files that ninja has finished, out of its log: start, end, time, file, hash of the command on each line."""
    try:
        lines = log.read_text(errors="replace").splitlines(keepends=True)
    except OSError:
        return []
    # The last line may not be written to its end.
    fields = [line.split("\t") for line in lines if line.endswith("\n") and not line.startswith("#")]
    return [field[3] for field in fields if len(field) == 5]


def cores() -> int:
    """Cores that compile at once: those of this process, of its container, or MAX_JOBS."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no limit, or no control groups
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        found = min(found, max(1, round(int(quota) / int(period))))
    jobs = os.environ.get("MAX_JOBS", "")
    return min(found, int(jobs)) if jobs.isdigit() and int(jobs) else found


def in_words(seconds: float) -> str:
    """``40 seconds``, ``3 minutes``: as exact as an estimate is."""
    if seconds < 55:
        return f"{max(10, round(seconds / 10) * 10)} seconds"
    minutes = max(1, round(seconds / 60))
    return f"{minutes} minute" + ("s" if minutes > 1 else "")


def on_terminal(line: str) -> None:
    """A line for the person at the terminal, whom pip shows nothing of what a build prints.

    It is left out where nobody reads it or where it might disturb: in CI, without a terminal (Windows' console counts
    as none), in the background.
    """
    if os.environ.get("CI") or not hasattr(os, "tcgetpgrp"):
        return
    with contextlib.suppress(OSError):
        terminal = os.open("/dev/tty", os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
        try:
            if os.tcgetpgrp(terminal) == os.getpgrp():
                os.write(terminal, f"\n{line}\n".encode())
        finally:
            os.close(terminal)

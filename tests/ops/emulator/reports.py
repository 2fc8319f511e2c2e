"""What the detectors have found, in words."""

from __future__ import annotations

import subprocess
from types import ModuleType
from typing import Any


def lines_of(library: str, places: list[int]) -> list[str]:
    """File and line of the instructions ``places`` bytes from the start of a library; of an intrinsic, its caller's."""
    if not places:
        return []
    command = ["addr2line", "-i", "-e", library]
    found = []
    for place in places:
        done = subprocess.run([*command, hex(place)], capture_output=True, text=True, check=False)
        lines = [line.split(" (")[0].removeprefix("./") for line in done.stdout.splitlines()]
        own = [line for line in lines if "cuda_runtime.h" not in line] or lines or [hex(place)]
        found.append(own[0])
    return found


def described(report: Any) -> str:
    text = report.text.format(*lines_of(report.library, report.places))
    again = f" (and {report.count - 1} times more)" if report.count > 1 else ""
    return f"{report.kind} in {report.kernel}: {text}{again}"


def taken(runtime: ModuleType) -> list[str]:
    """All reports since the last call."""
    found = [described(report) for report in runtime.reports()]
    runtime.clear()
    return found

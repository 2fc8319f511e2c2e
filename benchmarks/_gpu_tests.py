"""A group of the tests, in as many processes as it takes; what is done is not run again by the same command.

    python benchmarks/_gpu_tests.py cuda --output DIR --limit 500

Writes tests-GROUP.xml (JUnit) and tests-GROUP.txt, a summary. Exit status: 0 if all passed or were skipped, 1 if one
failed or if none passed, 130 if --limit came before the end, 2 if pytest itself failed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from _gpu_pytest import FOLDERS, GROUP, GROUPS, RECORD, TEST_SECONDS, read
from _resume import INTERRUPTED, write_text

ROOT = Path(__file__).resolve().parents[1]
GRACE = 10.0  # seconds pytest has to end after it was asked to
MOST_LOST = 20  # processes that a group may lose before it is given up


@dataclass
class Found:
    """What a record says: tests by how they ended, those a process ended in, how many there are."""

    ended: dict[str, dict[str, Any]] = field(default_factory=dict)
    lost: list[str] = field(default_factory=list)
    tests: int | None = None

    @property
    def left(self) -> int:
        """Tests without an outcome; those that could not be collected have an outcome and are no tests."""
        return max(0, (self.tests or 0) - sum("::" in name for name in self.ended))

    def counts(self) -> Counter[str]:
        return Counter(entry["outcome"] for entry in self.ended.values())


def found(record: Path) -> Found:
    result, begun = Found(), None
    for entry in read(record):
        if "process" in entry or "stopped" in entry:
            begun = None
        elif "begun" in entry:
            begun = entry["id"]
        elif "outcome" in entry:
            result.ended[entry["id"]] = entry
            result.lost += [entry["id"]] if entry.get("lost") else []
            begun = None
        elif "tests" in entry:
            result.tests = entry["tests"]
    if begun is not None:
        result.lost.append(begun)
    return result


def run(options: argparse.Namespace, record: Path, deadline: float) -> int:
    """Run what is left; the exit status without regard to how tests ended."""
    while True:
        before = len(found(record).ended)
        status = run_pytest(options, record, deadline)
        after = found(record)
        if status is None:
            return INTERRUPTED
        if (name := unended(record)) is not None:
            how = f"signal {-status}" if status < 0 else f"exit status {status}"
            message = f"its process ended in it, with {how}; more than {options.test_seconds:g} s, if there is a trace"
            note(record, id=name, outcome="failed", seconds=0.0, message=message, lost=True)
            if len(found(record).lost) >= MOST_LOST:
                print(f"given up: {MOST_LOST} processes were lost")
                return 2
        elif after.tests is None or (after.left and len(after.ended) == before):
            print(f"pytest ended with status {status} and ran no test")
            return 2
        elif not after.left:
            return 0


def run_pytest(options: argparse.Namespace, record: Path, deadline: float) -> int | None:
    """One process; None if it was stopped for lack of time."""
    command = [sys.executable, "-m", "pytest", "-p", "_gpu_pytest", "-p", "no:cacheprovider", "-m", ""]
    command += ["--continue-on-collection-errors", "-q", "--tb=short", "-o", "console_output_style=classic"]
    folder = FOLDERS.get(options.group)
    command += [str(path) for path in options.tests] or ([folder] if folder else [])
    benchmarks = str(Path(__file__).resolve().parent)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), benchmarks])),
        GROUP: options.group,
        RECORD: str(record.resolve()),
        TEST_SECONDS: str(options.test_seconds),
    }
    process = subprocess.Popen(command, cwd=options.root, env=environment, stdin=subprocess.DEVNULL)
    try:
        return process.wait(timeout=None if deadline == math.inf else max(deadline - time.monotonic(), 0.1))
    except subprocess.TimeoutExpired:
        note(record, stopped=True)
        stop(process)
        return None
    except KeyboardInterrupt:
        note(record, stopped=True)
        stop(process)
        raise


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def unended(record: Path) -> str | None:
    """The test in which the last process ended without a word."""
    begun = None
    for entry in read(record):
        if "begun" in entry:
            begun = entry["id"]
        elif "outcome" in entry or "process" in entry or "stopped" in entry:
            begun = None
    return begun


def note(record: Path, **entry: Any) -> None:
    with record.open("a") as file:
        file.write(json.dumps(entry) + "\n")


def junit(group: str, result: Found) -> str:
    counts = result.counts()
    suite = ElementTree.Element(
        "testsuite",
        name=f"gpu tests, {group}",
        tests=str(len(result.ended)),
        failures=str(counts["failed"]),
        skipped=str(counts["skipped"]),
        time=f"{sum(entry['seconds'] for entry in result.ended.values()):.3f}",
    )
    for name, entry in result.ended.items():
        path, _, test = name.partition("::")
        case = ElementTree.SubElement(
            suite, "testcase", classname=path, name=test or path, time=f"{entry['seconds']:.3f}"
        )
        if entry["outcome"] != "passed":
            tag = "failure" if entry["outcome"] == "failed" else "skipped"
            text = "".join(c for c in entry["message"] if c >= " " or c in "\n\t")
            ElementTree.SubElement(case, tag, message=last_line(text)).text = text
    ElementTree.indent(suite)
    return ElementTree.tostring(suite, encoding="unicode") + "\n"


def summary(group: str, result: Found) -> str:
    counts, entries = result.counts(), result.ended
    slow = sorted(entries, key=lambda name: -entries[name]["seconds"])[:5]
    reasons = Counter(last_line(entry["message"]) for entry in entries.values() if entry["outcome"] == "skipped")
    lines = [
        f"{group}: {counts['passed']} passed, {counts['failed']} failed, {counts['skipped']} skipped, "
        f"{result.left} left; {sum(entry['seconds'] for entry in entries.values()):.0f} s in tests, "
        f"{len(result.lost)} processes lost",
        "",
        *(
            f"FAILED {name}\n    {last_line(entry['message'])}"
            for name, entry in entries.items()
            if entry["outcome"] == "failed"
        ),
        *(f"skipped {number}: {reason}" for reason, number in reasons.most_common()),
        *(f"{entries[name]['seconds']:8.1f} s {name}" for name in slow),
    ]
    return "\n".join(lines) + "\n"


def last_line(text: str) -> str:
    lines = text.strip().splitlines()
    told = [line[1:].strip() for line in lines if line.startswith("E ")]  # what pytest says of the exception
    return (told or lines or [""])[0 if told else -1][:300]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("group", choices=GROUPS)
    parser.add_argument(
        "--tests", nargs="+", type=Path, default=[], metavar="PATH", help="files or folders (default: all)"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds")
    parser.add_argument("--test-seconds", type=float, default=120.0, help="after which a test has failed")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder to run pytest in")
    parser.add_argument("--may-skip-all", action="store_true", help="without a GPU: that none passed is no failure")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    deadline = time.monotonic() + options.limit - GRACE
    options.output.mkdir(parents=True, exist_ok=True)
    stem = options.output / f"tests-{options.group}"
    record = stem.with_suffix(".jsonl")
    try:
        status = run(options, record, deadline)
    except KeyboardInterrupt:
        status = INTERRUPTED
    result = found(record)
    write_text(stem.with_suffix(".xml"), junit(options.group, result))
    text = summary(options.group, result)
    write_text(stem.with_suffix(".txt"), text)
    print("\n" + text)
    print(text.splitlines()[0])  # last, where it is looked for
    if status:
        return status
    counts = result.counts()
    return 1 if counts["failed"] or not (counts["passed"] or options.may_skip_all) else 0


if __name__ == "__main__":
    sys.exit(main())

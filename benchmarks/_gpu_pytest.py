"""pytest plugin of ``_gpu_tests.py``: one group of the tests, each written down as it begins and as it ends.

A kernel that reads a wrong address breaks CUDA for its whole process, and one that waits for ever never returns. So a
process ends after a test that broke the device, or that takes too long; the next one goes on after that test.
"""

from __future__ import annotations

import faulthandler
import json
import os
from pathlib import Path
from typing import Any

import pytest

GROUP, RECORD, TEST_SECONDS = "GPU_TESTS_GROUP", "GPU_TESTS_RECORD", "GPU_TESTS_SECONDS"
BROKEN = 17  # exit status

# Within a group those that tell most come first, and those that take long last.
_FIRST = ("test_shapes", "test_layouts", "test_graph_capture", "test_captured_steps", "test_no_step_waits")
_LAST = ("test_compiles", "test_opcheck", "test_gradcheck")


def group_of(item: Any) -> str:
    """The group a test belongs to; every test has one."""
    path, name = item.path.as_posix(), item.name
    if "large" in item.keywords:
        return "large"
    if "gpu" not in item.keywords:
        return "slow-host" if "slow" in item.keywords else "host"
    if "slow" in item.keywords:
        return "slow"
    if "/ops/" in path:
        return "triton" if "cuda-triton" in name else "cuda"
    return "step" if "/step/" in path else "rest"


GROUPS = ("cuda", "step", "triton", "rest", "slow", "large", "host", "slow-host")
FOLDERS = {"cuda": "tests/ops", "triton": "tests/ops", "step": "tests/step"}  # where all tests of a group lie


class Plugin:
    def __init__(self, group: str, record: Path, seconds: float):
        self._group, self._path, self._seconds = group, record, seconds
        self._traces = record.with_suffix(".traces.txt").open("a")
        self._reports: list[pytest.TestReport] = []
        self._note(process=os.getpid())

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        ended = {entry["id"] for entry in read(self._path) if "outcome" in entry}
        mine = [item for item in items if group_of(item) == self._group]
        left = [item for item in mine if item.nodeid not in ended]
        # stable: otherwise as they stand in their files
        left.sort(key=lambda item: (item.name.startswith(_LAST), not item.name.startswith(_FIRST)))
        chosen = set(left)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = left
        self._note(tests=len(mine), left=len(left))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:  # a file that cannot be imported, perhaps for a package that is missing
            self._note(id=report.nodeid, outcome="failed", seconds=0.0, message=report.longreprtext[-2000:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._reports = []
        self._note(id=nodeid, begun=True)
        self._traces.write(f"\n{nodeid}\n")
        self._traces.flush()
        faulthandler.dump_traceback_later(self._seconds, exit=True, file=self._traces)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._reports.append(report)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        faulthandler.cancel_dump_traceback_later()
        failed = [report for report in self._reports if report.failed]
        skipped = [report for report in self._reports if report.skipped]
        outcome = "failed" if failed else "skipped" if skipped else "passed"
        if not failed and any(hasattr(report, "wasxfail") for report in skipped):
            outcome = "passed"  # it failed as it was expected to
        message = "".join(_text(report) for report in (failed or skipped)[:1])
        seconds = sum(report.duration for report in self._reports)
        self._note(id=nodeid, outcome=outcome, seconds=round(seconds, 3), message=message)
        if failed and (said := _broken()):
            self._note(broken=nodeid, message=said)
            pytest.exit(f"CUDA answers no more after {nodeid}: {said}", returncode=BROKEN)

    def _note(self, **entry: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a record; a last line that was cut off is none."""
    entries = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return entries


def _text(report: pytest.TestReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2])
    return report.longreprtext[-3000:]


def _broken() -> str:
    import torch

    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return ""


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(
        Plugin(os.environ[GROUP], Path(os.environ[RECORD]), float(os.environ[TEST_SECONDS])), "gpu_tests"
    )

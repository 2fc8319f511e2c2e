"""``benchmarks/_gpu_tests.py``: a group goes on after a test that ends its process, hangs, or was interrupted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "_gpu_tests.py"

# In the place of torch: quick to import, and with a device that breaks.
TORCH = """
class cuda:
    broken = False
    is_available = is_initialized = lambda: True

    def synchronize():
        if cuda.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""

TESTS = """
import os, time
import pytest
import torch

pytestmark = pytest.mark.gpu

def test_passes():
    assert True

def test_ends_its_process():
    os._exit(5)

def test_dies():
    os.kill(os.getpid(), 11)

def test_hangs():
    time.sleep(600)

def test_breaks_the_device():
    torch.cuda.broken = True
    torch.cuda.synchronize()

def test_fails():
    assert torch.cuda.broken, "not in a new process"

@pytest.mark.skip(reason="no such thing here")
def test_skipped():
    pass

def test_shapes():  # among those that come first
    open("order", "a").write("shapes ")

def test_is_last():
    open("order", "a").write("last ")

@pytest.mark.slow
def test_of_another_group():
    raise AssertionError("not in this group")
"""


@pytest.fixture
def project(tmp_path):
    (tmp_path / "pytest.ini").write_text(
        '[pytest]\nmarkers =\n  gpu: g\n  slow: s\n  large: l\naddopts = -m "not slow"\n'
    )
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "tests").mkdir()
    return tmp_path


def call(project, *arguments, group="rest", **options):
    command = [sys.executable, str(SCRIPT), group, "--output", str(project / "out"), "--root", str(project)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120, **options)


@pytest.mark.slow
def test_a_group_survives_its_tests(project):
    (project / "tests" / "test_it.py").write_text(TESTS)
    (project / "tests" / "test_broken.py").write_text("import no_such_package\n")
    done = call(project, "--test-seconds", "2")
    assert done.returncode == 1, done.stdout + done.stderr
    text = (project / "out" / "tests-rest.txt").read_text()
    assert text.startswith("rest: 3 passed, 6 failed, 1 skipped, 0 left;") and "3 processes lost" in text
    assert "test_it.py::test_fails\n    AssertionError: not in a new process" in text
    assert "test_breaks_the_device\n    RuntimeError: CUDA error: an illegal memory access" in text
    assert "test_dies\n    its process ended in it, with signal 11" in text
    assert "No module named 'no_such_package'" in text
    assert "skipped 1: Skipped: no such thing here" in text
    assert "test_hangs" in (project / "out" / "tests-rest.traces.txt").read_text()
    assert (project / "order").read_text() == "shapes last "  # once each
    suite = ElementTree.fromstring((project / "out" / "tests-rest.xml").read_text())
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("10", "6", "1")

    done = call(project)  # nothing is left, so nothing is run
    assert done.returncode == 1 and (project / "order").read_text() == "shapes last "
    done = call(project, group="slow")
    assert done.returncode == 1 and "slow: 0 passed, 2 failed" in done.stdout


@pytest.mark.slow
def test_a_group_that_was_stopped_goes_on(project):
    (project / "tests" / "test_it.py").write_text(
        "import os, time\n\ndef test_one():\n    pass\n\n"
        "def test_two():\n    open('began', 'a').write('x')\n    time.sleep(0 if os.path.exists('go') else 60)\n"
    )
    done = call(project, "--limit", "16", group="host")
    assert done.returncode == 130, done.stdout + done.stderr
    assert "host: 1 passed, 0 failed, 0 skipped, 1 left" in done.stdout
    (project / "go").touch()
    done = call(project, group="host")
    assert done.returncode == 0 and "host: 2 passed, 0 failed, 0 skipped, 0 left" in done.stdout
    assert (project / "began").read_text() == "xx"


@pytest.mark.slow
def test_a_group_in_which_nothing_passes_has_failed(project):
    (project / "tests" / "test_it.py").write_text(
        "import pytest\n\n@pytest.mark.gpu\ndef test_one():\n    pytest.skip('the library was not built')\n"
    )
    done = call(project)
    assert done.returncode == 1 and "the library was not built" in done.stdout
    assert call(project, "--may-skip-all").returncode == 0
    environment = {**os.environ, "PYTEST_ADDOPTS": "--no-such-option"}
    assert call(project, group="slow", env=environment).returncode == 2

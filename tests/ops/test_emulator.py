"""The emulator of the CUDA kernels finds what it is there to find, and nothing in kernels that are right."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("pybind11")
import asan  # noqa: E402
from emulator import build, reports  # noqa: E402

HERE = Path(__file__).resolve().parent
THREADS, ELEMENTS = 64, 256

pytestmark = [
    pytest.mark.skipif(build.compiler() is None, reason="needs Linux and a C++ compiler"),
    pytest.mark.slow,  # nearly all of it is compilation
]


class Bench:
    """The kernels of ``controls.cu`` with memory of their own."""

    def __init__(self, runtime: ModuleType, library: Path) -> None:
        self.runtime = runtime
        self._run = ctypes.CDLL(str(library)).run
        self._run.restype = ctypes.c_bool

    def __call__(
        self, name: str, how: int = 0, *, seed: int | None = None, blocks: int = 1, written: bool = True
    ) -> tuple[list[str], list[float]]:
        """What the detectors report, and what the data is afterwards."""
        self.runtime.set_seed(seed)
        data, counter = self.runtime.allocate(4 * ELEMENTS), self.runtime.allocate(4)
        values = (ctypes.c_float * ELEMENTS).from_address(data)
        ctypes.c_uint.from_address(counter).value = 0
        values[:] = [0.0] * ELEMENTS
        if not written:
            self.runtime.made_empty(data, 4 * ELEMENTS)
        self.ended = self._run(
            name.encode(), blocks, ctypes.c_void_p(data), ctypes.c_void_p(counter), ELEMENTS, ctypes.c_uint(how)
        )
        found, result = reports.taken(self.runtime), list(values)
        self.runtime.release(data)
        self.runtime.release(counter)
        return found, result


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("emulator")
    build.build_runtime(folder)
    runtime = build.load_runtime(folder)
    runtime.detect_races(True)
    yield Bench(runtime, build.build(HERE / "emulator" / "controls.cu", folder, torch=False))
    runtime.detect_races(False)
    runtime.set_seed(None)


# Control, what is right about it, blocks, and what its report says.
DEFECTS = {
    "shared memory without a barrier": ("shared_race", 0, 1, "race", r"the shared array partial \(.*controls.cu:\d+\)"),
    "lanes without __syncwarp": ("warp_race", 0, 1, "race", "the shared array partial"),
    "a shuffle orders nothing": ("warp_race", 2, 1, "race", "the shared array partial"),
    "a tree of sums without a barrier": ("tree_race", 0, 1, "race", "the shared array partial"),
    "one element of a tensor from a block": ("global_race", 2, 1, "race", "byte 0 of a tensor of 1024 bytes"),
    "one element of a tensor from two blocks": ("global_race", 1, 2, "race", "byte 0 of a tensor of 1024 bytes"),
    "a ticket without the fence before it": ("last_block", 2 + 4 + 8, 3, "race", "of a tensor of 1024 bytes"),
    "a ticket without the fence behind it": ("last_block", 1 + 4 + 8, 3, "race", "of a tensor of 1024 bytes"),
    "a ticket before the block has written": ("last_block", 1 + 2 + 8, 3, "race", "of a tensor of 1024 bytes"),
    "a ticket that is not atomic": ("last_block", 1 + 2 + 4, 3, "race", "of a tensor of 4 bytes"),
    "a mask with lanes that take no part": ("mask", 4, 1, "mask", r"for the lanes 16, .* 31|names lanes .* 31"),
    "a shuffle from a lane outside of the mask": ("mask", 1 + 4, 1, "mask", "reads lane 20 at"),
    "a mask with a lane that has ended": ("mask", 1 + 2 + 8, 1, "mask", "names lanes that have ended or are none: 31"),
    "a lane that is not in its mask": ("mask", 1 + 2 + 4, 1, "mask", "is not in the mask it gives"),
    "two barriers at a time": ("barrier", 2, 1, "barrier", "while thread"),
    "a barrier that a thread never meets": ("barrier", 1, 1, "barrier", "thread 5 of block 0 has ended without"),
    "shared memory that nobody wrote": ("unwritten", 2, 1, "unwritten", r"byte \d+ of the shared array partial"),
    "a tensor that nobody wrote": ("unwritten", 1, 1, "unwritten", r"byte \d+ of a tensor made at .* of 1024 bytes"),
    "behind and before a tensor": ("bounds", 2 + 4, 1, "bounds", "8 bytes behind the end of a tensor of 1024 bytes"),
    "behind a shared array": ("bounds", 1 + 4, 1, "bounds", r"\d+ bytes behind the end of the shared array partial"),
    "an index outside of its array": ("bounds", 1 + 2, 1, "bounds", "the index 64 at .*controls.cu"),
    "a null pointer": ("null", 0, 1, "bounds", "an address that belongs to no tensor and no shared array"),
    "a vector at another address": ("alignment", 0, 1, "alignment", r"byte \d+ of a tensor of 1024 bytes"),
}
# With every defect mended.
RIGHT = {
    "shared_race": 1,
    "warp_race": 1,
    "tree_race": 1,
    "global_race": 3,
    "last_block": 15,
    "mask": 15,
    "barrier": 3,
    "unwritten": 3,
    "bounds": 7,
    "null": 1,
    "alignment": 1,
}


@pytest.mark.parametrize("seed", [None, 0, 1, 2])
@pytest.mark.parametrize("defect", DEFECTS)
def test_finds(bench: Bench, defect: str, seed: int | None) -> None:
    name, how, blocks, kind, says = DEFECTS[defect]
    found, _ = bench(name, how, seed=seed, blocks=blocks, written=name != "unwritten")
    assert found, "nothing was found"
    named = [report for report in found if report.startswith(f"{kind} in {name}_kernel: ") and re.search(says, report)]
    assert named, "\n".join(found)
    if kind == "race":
        threads = re.findall(r"thread (\d+) of block (\d+) \w+", named[0])
        assert len(set(threads)) == 2
        assert len(re.findall(r"controls\.cu:\d+, which|controls\.cu:\d+: nothing", named[0])) == 2


@pytest.mark.parametrize("name", RIGHT)
def test_finds_nothing_in_the_same_without_the_defect(bench: Bench, name: str) -> None:
    for seed in (None, *range(5)):
        for blocks in (1, 2, 5) if name in ("global_race", "last_block") else (1,):
            found, _ = bench(name, RIGHT[name], seed=seed, blocks=blocks, written=name != "unwritten")
            assert not found and bench.ended, "\n".join(found)


def test_threads_that_wait_for_each_other_end_the_launch(bench: Bench) -> None:
    found, _ = bench("stuck")
    assert not bench.ended
    assert any(re.search(r"barrier in stuck_kernel: thread \d+ .* waits for ever at", report) for report in found)
    assert any(re.search(r"mask in stuck_kernel: .* for ever at .* for the lanes 0, 1, .*", report) for report in found)
    found, _ = bench("last_block", 15, blocks=3)  # and the next launch runs
    assert bench.ended and not found


def test_a_seed_is_an_order(bench: Bench) -> None:
    def sums(name: str, how: int, seeds: range) -> list[float]:
        return [bench(name, how, seed=seed, blocks=7)[1][0] for seed in seeds]

    assert sums("unordered_sum", 0, range(10)) == sums("unordered_sum", 0, range(10))
    assert len(set(sums("unordered_sum", 0, range(10)))) > 1  # the detectors are silent, the bits are not
    assert len(set(sums("last_block", 15, range(10)))) == 1


def test_address_sanitizer_sees_the_kernels(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    build.build_runtime(tmp_path, build.ADDRESS)
    library = build.build(HERE / "emulator" / "controls.cu", tmp_path, build.ADDRESS, torch=False)
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, test_emulator as t\n"
        f"bench = t.Bench(t.build.load_runtime(t.Path({str(tmp_path)!r})), t.Path({str(library)!r}))\n"
        "bench('bounds', int(sys.argv[1]))\n"
    )
    assert asan.run(tmp_path, [str(script), "7"]) == 0
    for how in (1 + 4, 2 + 4):  # behind the shared array, behind the tensor
        assert asan.run(tmp_path, [str(script), str(how)]) != 0
        printed = capfd.readouterr().out
        assert "heap-buffer-overflow" in printed and "bounds_kernel" in printed

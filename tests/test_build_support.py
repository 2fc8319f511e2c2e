"""Parts of the build: what an object's name depends on, damaged objects, architectures, the lines about progress."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "csrc" / "build_support" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


objects, progress, toolkit = load("objects"), load("progress"), load("toolkit")


@pytest.fixture
def csrc(tmp_path: Path) -> Path:
    folder = tmp_path / "csrc"
    (folder / "cpu").mkdir(parents=True)
    (folder / "cpu" / "a.cpp").write_text('#include <torch/x.h>\n#include "../near.h"\n')
    (folder / "near.h").write_text('#pragma once\n#  define FAR "far.h"\n#include FAR\n')
    (folder / "far.h").write_text('#include "near.h"\n')
    (folder / "other.h").write_text("int other;\n")
    return folder


def key(csrc: Path, made_with: object = "-O3") -> str:
    return objects.key(csrc / "cpu" / "a.cpp", csrc, made_with)


@pytest.mark.parametrize("name", ["cpu/a.cpp", "near.h", "far.h"])
def test_key_follows_the_source_and_all_its_headers(csrc: Path, name: str) -> None:
    before = key(csrc)
    (csrc / name).write_text((csrc / name).read_text() + "// changed\n")
    assert key(csrc) != before


def test_key_follows_what_an_object_is_made_with_and_nothing_else(csrc: Path, tmp_path: Path) -> None:
    assert key(csrc, ["gcc 12", "-O3"]) != key(csrc, ["gcc 13", "-O3"]) != key(csrc, ["gcc 13", "-O2"])
    (csrc / "other.h").write_text("int changed;\n")
    os.utime(csrc / "near.h", (0, 0))
    copy = shutil.copytree(csrc, tmp_path / "elsewhere" / "csrc")
    assert key(csrc) == key(copy)


def test_key_follows_torch_s_headers_by_content(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    (folder / "torch" / "headeronly" / "util").mkdir(parents=True)
    (folder / "torch" / "headeronly" / "util" / "x.h").write_text("1")
    copy = shutil.copytree(folder, tmp_path / "two")
    assert objects.headers_digest(folder) == objects.headers_digest(copy)
    (copy / "torch" / "headeronly" / "util" / "x.h").write_text("2")
    assert objects.headers_digest(folder) != objects.headers_digest(copy)


def test_places_are_named_and_not_kept() -> None:
    flags = {"cxx": ["-ffile-prefix-map=/tmp/a/=", "-O3"], "n": 1}
    assert objects.placeless(flags, {"/tmp/a/": "source"}) == {"cxx": ["-ffile-prefix-map=<source>=", "-O3"], "n": 1}


def test_headers_are_those_that_the_compiler_reads() -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    csrc = ROOT / "csrc"
    for source in (csrc / "cpu" / "batch_norm_act_max_pool.cpp", csrc / "cuda" / "batch_norm_act_max_pool.cu"):
        # Headers that are missing here, those of torch and CUDA, are named and not read.
        command = [compiler, "-std=c++20", "-MM", "-MG", "-x", "c++", str(source)]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.replace("\\\n", " ").split()
        read = {Path(name).resolve() for name in names[1:] if name.startswith(str(csrc))}
        assert set(objects.with_headers(source, csrc)) == read and len(read) > 5


def test_sources_include_torch_headers_of_the_known_folders_alone() -> None:
    for path in (ROOT / "csrc").rglob("*.*"):
        if path.suffix in (".h", ".cpp", ".cu") and path.parent.name != "nodes":  # which is built for one torch alone
            for line in path.read_text().splitlines():
                if line.startswith("#include <torch/"):
                    assert line.removeprefix("#include <").startswith(objects.STABLE_HEADERS), f"{path}: {line}"


@pytest.fixture
def kept(tmp_path: Path) -> tuple[object, Path]:
    made = tmp_path / "a.o"
    made.write_bytes(bytes(range(256)) * 4)
    store = objects.Objects(tmp_path / "objects")
    store.keep("k", made)
    return store, tmp_path / "objects" / "k"


def test_an_object_comes_back_as_it_was(kept, tmp_path: Path) -> None:
    store, _ = kept
    assert not store.take("another", tmp_path / "b.o") and not (tmp_path / "b.o").exists()
    assert store.take("k", tmp_path / "folder" / "b.o")
    assert (tmp_path / "folder" / "b.o").read_bytes() == (tmp_path / "a.o").read_bytes()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[:40],
        lambda content: content[:10],
        lambda content: b"",
        lambda content: content[:100] + b"?" + content[101:],
        lambda content: bytes(len(content)),
    ],
    ids=["a byte short", "truncated", "in the digest", "empty", "a byte changed", "zeros"],
)
def test_a_damaged_object_is_found(kept, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    store, file = kept
    file.write_bytes(damage(file.read_bytes()))
    assert not store.take("k", tmp_path / "b.o") and not (tmp_path / "b.o").exists()
    store.keep("k", tmp_path / "a.o")
    assert store.take("k", tmp_path / "b.o")


def test_an_interrupted_write_leaves_no_object(kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, file = kept
    file.unlink()
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.keep("k", tmp_path / "a.o")
    assert not store.take("k", tmp_path / "b.o")


def test_a_folder_that_cannot_be_written_fails_no_build(kept, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    store = objects.Objects(tmp_path / "file" / "objects")
    store.keep("k", tmp_path / "a.o")
    assert "a.o is not kept for the next build" in capsys.readouterr().out
    assert not store.take("k", tmp_path / "b.o") and store.lock() is None


def test_what_is_not_used_for_long_is_deleted(kept, tmp_path: Path) -> None:
    store, file = kept
    store.keep("recent", tmp_path / "a.o")
    long_ago = time.time() - (objects.DAYS + 1) * 86400
    os.utime(file, (long_ago, long_ago))
    assert store.take("k", tmp_path / "b.o")  # which counts as a use
    store.prune()
    assert file.exists()
    os.utime(file, (long_ago, long_ago))
    store.prune()
    assert [path.name for path in store.folder.iterdir()] == ["recent"]


def test_one_build_at_a_time(kept) -> None:
    pytest.importorskip("fcntl")
    store, file = kept
    held = store.lock()
    script = (
        "import importlib.util, sys, time\n"
        "spec = importlib.util.spec_from_file_location('objects', sys.argv[1])\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "from pathlib import Path\n"
        "lock = module.Objects(Path(sys.argv[2])).lock()\n"
        "print('has it', flush=True)\n"
    )
    command = [sys.executable, "-c", script, str(ROOT / "csrc" / "build_support" / "objects.py"), str(store.folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "auglocal_ext: waiting for another build in this folder\n"
        assert other.poll() is None
        held.close()
        assert other.stdout.readline() == "has it\n"


def executable(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(0o755)
    return path


ALL = "75 80 86 87 89 90 100 103 110 120 121"


@pytest.mark.parametrize(
    ("gpus", "known", "expected"),
    [
        ([], ALL, "8.0;9.0+PTX"),
        ([], "75 80 86", "8.0+PTX"),
        (["9.0"], ALL, "9.0+PTX"),
        (["12.0", "8.6", "8.6", "10.0"], ALL, "8.6;10.0;12.0+PTX"),
        (["7.5"], ALL, "7.5+PTX"),
        (["8.7"], ALL, "8.7+PTX"),
        (["12.0"], "80 86 90", "9.0+PTX"),  # a toolkit older than the GPU, which runs its PTX
        (["6.1"], ALL, "8.0;9.0+PTX"),  # a GPU older than all that the toolkit knows
        (["6.1", "8.9"], ALL, "8.9+PTX"),
        (["NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."], ALL, "8.0;9.0+PTX"),
    ],
)
def test_architectures(
    gpus: list[str], known: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = " ".join(f"compute_{number}" for number in known.split())
    nvcc = executable(tmp_path / "nvcc", f'[ "$1" = --list-gpu-arch ] && printf "%s\\n" {numbers}\nexit 0\n')
    answer = "; ".join(f"echo '{gpu}'" for gpu in gpus)
    executable(tmp_path / "bin" / "nvidia-smi", f'[ "$1" = --query-gpu=compute_cap ] || exit 2\n{answer or "exit 9"}\n')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/bin{os.pathsep}/usr/bin")
    assert toolkit.architectures(str(nvcc)) == expected
    monkeypatch.setenv("PATH", "/nowhere")
    assert toolkit.gpus() == set()


def test_every_architecture(tmp_path: Path) -> None:
    nvcc = executable(tmp_path / "new", "printf '%s\\n' compute_75 compute_80 compute_87 compute_90 compute_100\n")
    assert toolkit.every_architecture(str(nvcc)) == "8.0;9.0;10.0+PTX"
    nvcc = executable(tmp_path / "old", "echo compute_35\n")
    with pytest.raises(toolkit.NotBuilt, match="knows none"):
        toolkit.architectures(str(nvcc))


def test_flags_of_a_list_are_those_torch_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    assert sorted(cpp_extension._get_cuda_arch_flags()) == sorted(toolkit.gencode("8.0;9.0+PTX"))


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "cores", lambda: 2)
    monkeypatch.setattr(progress, "SECONDS", {".cpp": (10.0, 0.0), ".cu": (20.0, 10.0)})


def test_lines_say_what_is_compiled_and_for_how_long(two_cores: None) -> None:
    cuda = progress.Progress(["a.cu", "b.cu", "c.cu", "d.cu"], "8.0;9.0+PTX", print)
    assert cuda.line(0) == (
        "auglocal_ext: compiling 4 CUDA files for 8.0 9.0+PTX, about 1 minute on 2 cores (0 of 4 done)"
    )
    assert cuda.line(1) == (
        "auglocal_ext: compiling 4 CUDA files for 8.0 9.0+PTX, about 1 minute left on 2 cores (1 of 4 done)"
    )
    cpp = progress.Progress(["a.cpp"], "", print)
    assert cpp.line(0) == "auglocal_ext: compiling 1 C++ file, about 10 seconds on 2 cores (0 of 1 done)"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(1, "10 seconds"), (44, "40 seconds"), (54, "50 seconds"), (55, "1 minute"), (200, "3 minutes")],
)
def test_estimates_in_words(seconds: float, words: str) -> None:
    assert progress.in_words(seconds) == words


def test_jobs_are_limited_by_max_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_JOBS", "1")
    assert progress.cores() == 1
    monkeypatch.setenv("MAX_JOBS", "many")
    assert progress.cores() >= 1


def test_each_finished_object_makes_a_line(two_cores: None, tmp_path: Path) -> None:
    said: list[str] = []
    finished: list[str] = []
    log = tmp_path / ".ninja_log"
    reporter = progress.Progress(["a.cpp", "b.cpp"], "", said.append)
    with pytest.raises(RuntimeError), reporter.watched(log, finished.append):
        log.write_text("# ninja log v5\n0\t9\t1\t/x/a.o\tabc\n0\t9\t1\t/x/b.o")
        raise RuntimeError("the compiler failed")
    assert finished == ["/x/a.o"]  # the other one's line is not complete
    assert [line.rpartition("(")[2] for line in said] == ["1 of 2 done)"]


ON_TERMINAL = """
import fcntl, importlib.util, os, sys, termios
spec = importlib.util.spec_from_file_location("progress", sys.argv[1])
progress = importlib.util.module_from_spec(spec); spec.loader.exec_module(progress)
if sys.argv[2] != "no terminal":
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
if sys.argv[2] == "in the background":
    if os.fork():
        os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
    os.setpgid(0, 0)
progress.on_terminal("a line")
os.write(0, b"end")
"""


@pytest.mark.parametrize(
    ("where", "environment", "shown"),
    [
        ("in front", {}, b"\r\na line\r\n"),
        ("in front", {"CI": "true"}, b""),
        ("in the background", {}, b""),
        ("no terminal", {}, b""),
    ],
)
def test_a_line_for_the_person_at_the_terminal(where: str, environment: dict[str, str], shown: bytes) -> None:
    if not hasattr(os, "openpty"):
        pytest.skip("needs pseudo-terminals")
    ours, theirs = os.openpty()
    variables = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run(
        [sys.executable, "-c", ON_TERMINAL, str(ROOT / "csrc" / "build_support" / "progress.py"), where],
        stdin=theirs,
        capture_output=True,
        env={**variables, **environment},
        start_new_session=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    read = b""
    while not read.endswith(b"end"):
        read += os.read(ours, 100)
    assert read == shown + b"end"
    os.close(ours), os.close(theirs)


@pytest.mark.parametrize("edited", [False, True])
def test_an_object_of_a_source_that_was_edited_meanwhile_is_not_kept(
    csrc: Path, tmp_path: Path, edited: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_module = load("compile")
    source = csrc / "cpu" / "a.cpp"

    class Compiler:
        compiler_so = ["c++"]

        def object_filenames(self, sources: list[str], output_dir: str) -> list[str]:
            return [f"{output_dir}/a.o"]

        def compile(self, sources: list[str], output_dir: str, **options: object) -> list[str]:
            (tmp_path / "temp").mkdir()
            (tmp_path / "temp" / "a.o").write_text("object")
            if edited:
                source.write_text("int edited;\n")
            return [f"{output_dir}/a.o"]

    command = compile_module.ReusingBuild.__new__(compile_module.ReusingBuild)
    command.compiler, command.objects = Compiler(), objects.Objects(tmp_path / "objects")
    command.key, command.say = lambda path, flags: objects.key(Path(path), csrc, flags), print
    command.progress = lambda sources: progress.Progress(sources, "", print)
    monkeypatch.setattr(
        compile_module.BuildExtension,
        "build_extension",
        lambda self, ext: self.compiler.compile([str(source)], output_dir=str(tmp_path / "temp")),
    )
    command.build_extension(None)
    assert len(list(tmp_path.glob("objects/*"))) == (0 if edited else 1)

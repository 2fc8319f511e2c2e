"""``benchmarks/gpu.py``: slices that go on, limits that hold, archives, the tasks of OWED.md; a dry run of them all."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).resolve().parents[1]
OWED = (ROOT / "benchmarks" / "results" / "OWED.md").read_text()


@pytest.fixture
def gpu(load_benchmark):
    return load_benchmark("gpu")


@pytest.fixture
def slices(gpu, monkeypatch):
    import _gpu_slices

    monkeypatch.setattr(_gpu_slices, "GRACE", 0.5)
    monkeypatch.setattr(_gpu_slices, "RESERVE", 0.1)
    return _gpu_slices


def python(code):
    return lambda seconds: [sys.executable, "-S", "-c", f"import os, sys, time\nseconds = {seconds}\n{code}"]


@pytest.fixture
def make(slices, tmp_path):
    """A slice of fake tasks: ``make({"name": code or Task arguments}, seconds)``."""

    def run(tasks, seconds=20.0, **options):
        listed = []
        for name, given in tasks.items():
            given = given if isinstance(given, dict) else {"code": given}
            command = python(given.pop("code", ""))
            listed.append(slices.Task(name, "", command, **{"seconds": 10, "least": 0.1, **given}))
        found = slices.Slices(listed, tmp_path / "out", {"gpu": "simulated"}, dict(os.environ), **options)
        found.run(seconds)
        return found

    return run


def statuses(found):
    return {task.name: found.entry(task)["status"] for task in found.tasks}


def test_a_failure_ends_no_other_task(make, tmp_path):
    found = make(
        {
            "fails": "print('what went wrong'); sys.exit(3)",
            "dies": "os.kill(os.getpid(), 9)",
            "passes": {"code": "open('a-cpu.json', 'w').write('{}')", "results": {"a-*.json": "a.json", "b": "b.txt"}},
            "cannot": {"missing": lambda: "no such tool"},
        }
    )
    assert statuses(found) == {"fails": "failed", "dies": "failed", "passes": "done", "cannot": "left out"}
    out = tmp_path / "out"
    assert (out / "results" / "a.json").read_text() == "{}"
    summary = json.loads((out / "summary.json").read_text())
    notes = {task["name"]: task["note"] for task in summary["tasks"]}
    assert notes == {
        "fails": "exit status 3: what went wrong",
        "dies": f"exit status -9: {(out / 'logs' / 'dies.txt').read_text().splitlines()[-1]}",
        "passes": "",
        "cannot": "no such tool",
    }
    assert re.search(r"\| passes \| done \| \d+ \| a.json \|  \|", (out / "summary.md").read_text())
    again = make({"fails": "", "dies": "", "passes": "sys.exit(9)", "cannot": ""})
    assert statuses(again) == {"fails": "failed", "dies": "failed", "passes": "done", "cannot": "done"}


@pytest.mark.slow
def test_a_task_that_would_go_on_has_its_turn_again(make, tmp_path):
    order = f"open({str(tmp_path / 'order')!r}, 'a').write({{}});"
    gradual = order.format("'g'") + "n = len(open('n').read()) if os.path.exists('n') else 0; "
    gradual += "open('n', 'a').write('x'); time.sleep(wait); sys.exit(0 if n == 4 else 130)"
    found = make({"gradual": "wait = 0;" + gradual, "other": order.format("'o'")})
    assert statuses(found) == {"gradual": "cut off", "other": "done"}
    # It ended long before it had to: it needs more time than it was given, and there is no more in this slice.
    assert [task.name for task in found.left] == ["gradual"] and (tmp_path / "order").read_text() == "go"
    long = {"code": "wait = 0.9;" + gradual, "seconds": 1.5, "resumes": True}
    found = make({"gradual": long, "other": order.format("'o'"), "new": order.format("'n'")})
    assert statuses(found) == {"gradual": "done", "other": "done", "new": "done"} and not found.left
    assert (tmp_path / "order").read_text() == "gogngg" + "g"
    assert [sitting["slice"] for sitting in found.entry(found.tasks[0])["sittings"]] == [1, 2, 2, 2, 2]


@pytest.mark.slow
def test_limits_hold(make, tmp_path):
    stubborn = "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    start = time.monotonic()
    found = make(
        {
            "sleeps": {
                "code": "open('begun', 'a').write(f'{seconds} '); time.sleep(60)",
                "seconds": 1.5,
                "resumes": True,
            },
            "stubborn": {"code": stubborn, "seconds": 1.5, "resumes": True},
            "grandchild": {"code": "import subprocess; subprocess.run(['sleep', '60'])", "seconds": 1.0},
            "long": {"least": 30},
            "last": "",
        },
        8,
    )
    assert time.monotonic() - start < 8  # what was cut off had the rest of it
    assert statuses(found) == {
        "sleeps": "cut off",
        "stubborn": "stopped",
        "grandchild": "stopped",
        "long": "left",
        "last": "done",
    }
    assert (tmp_path / "out" / "work" / "sleeps" / "begun").read_text().startswith("1.5 ")
    assert [task.name for task in found.left] == ["sleeps", "stubborn", "grandchild", "long"]


@pytest.mark.slow
def test_what_is_stopped_comes_last_and_is_given_up(make, tmp_path):
    stubborn = {"seconds": 1.5, "code": "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"}
    note = f"open({str(tmp_path / 'order')!r}, 'a').write"
    first = make({"hangs": dict(stubborn), "next": {"code": f"{note}('n')", "least": 99}})
    assert statuses(first) == {"hangs": "stopped", "next": "left"}
    found = make({"hangs": {**stubborn, "code": f"{note}('h'); {stubborn['code']}"}, "next": f"{note}('n')"})
    assert (tmp_path / "order").read_text() == "nh"
    assert statuses(found) == {"hangs": "stopped", "next": "done"} and not found.left


def test_a_slice_that_was_killed_goes_on_with_the_next_task(make, slices, tmp_path):
    state = {"status": "running", "note": "", "seconds": 0.0, "sittings": [], "stops": 0, "results": []}
    (tmp_path / "out" / "work" / "first").mkdir(parents=True)
    (tmp_path / "out" / "work" / "first" / "part.json").write_text("[1]")
    (tmp_path / "out" / "state.json").write_text(json.dumps({"slices": [{"gpu": "x"}], "tasks": {"first": state}}))
    note = f"open({str(tmp_path / 'order')!r}, 'a').write"
    found = make({"first": {"code": f"{note}('1')", "results": {"part.json": "part.json"}}, "second": f"{note}('2')"})
    assert (tmp_path / "order").read_text() == "21" and statuses(found) == {"first": "done", "second": "done"}
    assert (tmp_path / "out" / "results" / "part.json").read_text() == "[1]"  # what it had written before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cuts_off_what_runs_and_writes_everything(make, tmp_path, number):
    def ask():
        while not (tmp_path / "out" / "work" / "sleeps" / "begun").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    start = time.monotonic()
    found = make({"sleeps": {"code": "open('begun', 'w'); time.sleep(60)", "resumes": True}, "other": ""}, 30)
    thread.join()
    assert time.monotonic() - start < 10
    assert statuses(found) == {"sleeps": "cut off", "other": "left"}
    assert json.loads((tmp_path / "out" / "state.json").read_text())["tasks"]["sleeps"]["status"] == "cut off"


def test_tasks_that_are_not_chosen_stay_in_the_summary(make, slices, tmp_path):
    make({"one": "", "two": "sys.exit(130)"}, 3)
    one, two = (slices.Task(name, "", python("")) for name in ("one", "two"))
    found = slices.Slices([one, two], tmp_path / "out", {"gpu": "simulated"}, dict(os.environ), chosen=[two])
    assert statuses(found) == {"one": "done", "two": "cut off"} and found.left == [two]
    found.run(1)  # too little for it
    assert "| one | done |" in (tmp_path / "out" / "summary.md").read_text()


def test_what_looks_at_the_machine_runs_in_every_slice(make, tmp_path):
    look = {"code": "open('n', 'a').write('x'); sys.exit(1)", "always": True}
    make({"look": dict(look), "other": ""})
    found = make({"look": dict(look), "other": ""})
    assert statuses(found) == {"look": "failed", "other": "done"}
    assert (tmp_path / "out" / "work" / "look" / "n").read_text() == "xx"


def test_long_logs_keep_beginning_and_end(make, slices, tmp_path, monkeypatch):
    monkeypatch.setattr(slices, "LOG_BYTES", 4000)
    make({"talks": "print('first'); print('x' * 100000); print('last')"})
    log = (tmp_path / "out" / "logs" / "talks.txt").read_text()
    assert "first" in log and log.endswith("last\n") and "bytes left out" in log and len(log) < 5000


def test_archives_are_few_and_bounded(gpu, tmp_path):
    folder = tmp_path / "out"
    for name, size in {
        "summary.json": 10,
        "results/a.json": 600_000,
        "logs/a.txt": 500_000,
        "work/t/state.jsonl": 10,
        "work/a/checkpoint.pt": 900_000,
        "work/a/huge.pt": 1_500_000,
        "site/lib.so": 10,
        "cache/x": 10,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.urandom(size))
    written = gpu.write_archives(folder, tmp_path / "back", "slice-1", most_bytes=1_000_000, most_archives=3)
    assert [path.name for path in written] == ["slice-1.tar.gz", "slice-1-2.tar.gz", "slice-1-3.tar.gz"]
    names = []
    for path in written:
        assert path.stat().st_size < 1_010_000
        with tarfile.open(path) as tar:
            names.append(tar.getnames())
    assert names[0] == ["summary.json", "results/a.json", "work/t/state.jsonl", "left-out.txt"]
    assert names[1:] == [["logs/a.txt"], ["work/a/checkpoint.pt"]]
    with tarfile.open(written[0]) as tar:
        assert tar.extractfile("left-out.txt").read() == b"work/a/huge.pt: 1500000 bytes\n"
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == sorted(path.name for path in written)


@pytest.mark.parametrize(
    ("architectures", "capability", "covered"),
    [
        ("9.0", "9.0", True),
        ("8.0;8.6;8.9;9.0;10.0;12.0+PTX", "9.0", True),
        ("8.0", "8.9", True),
        ("8.0", "9.0", False),
        ("8.0+PTX", "9.0", True),
        ("8.9", "8.6", False),
        ("9.0a", "9.0", True),
        ("10.0a", "10.3", False),
        ("12.0+PTX", "9.0", False),
        ("sm_90", "9.0", True),
        ("sm_80;compute_80", "9.0", True),
        ("sm_80;sm_100", "9.0", False),
        ("sm_86", "8.9", True),
        ("sm_90a", "9.0", True),
        ("", "9.0", False),
    ],
)
def test_architectures_that_run_on_a_gpu(gpu, architectures, capability, covered):
    from _gpu_build import covers, obstacle

    assert covers(architectures.split(";"), capability) == covered
    found = {"providers": {"cuda": {"available": True, "architectures": architectures}}}
    assert (obstacle(found, capability) is None) == covered
    assert obstacle(found, None) is None
    found["providers"]["cuda"]["targets"] = architectures.split(";")
    assert (obstacle(found, capability) is None) == covered
    found["providers"]["cuda"]["devices"] = {"cuda:0": "an older driver"}
    assert obstacle(found, capability) == "an older driver"
    assert obstacle({"providers": {"cuda": {"available": False, "reason": "not built: no nvcc"}}}, None).endswith(
        "nvcc"
    )
    assert "failed: No module" in obstacle("Traceback\nNo module named torch", None)


@pytest.mark.parametrize(
    ("status", "output", "expected"),
    [
        (0, "5 passed\n========= ERROR SUMMARY: 0 errors\n", 0),
        (0, "5 passed\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", 0),
        (86, "5 passed\n========= ERROR SUMMARY: 3 errors\n", 1),
        (0, "5 passed\n========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", 1),
        (0, "5 passed\n========= ERROR SUMMARY: 10 errors\n", 1),
        (1, "4 passed, 1 failed\n========= ERROR SUMMARY: 0 errors\n", 1),
        (0, "5 skipped\n========= ERROR SUMMARY: 0 errors\n", 1),
        (255, "========= Error: Device not supported. Please refer to the documentation\n", 1),
    ],
)
def test_what_the_sanitizer_says_is_understood(gpu, status, output, expected):
    from _gpu_sanitizer import judge

    found, sentence = judge(status, output, "memcheck")
    assert found == expected, sentence
    if status == 255:
        assert "Device not supported" in sentence


def owed():
    """Task -> (ticked, result files), from OWED.md."""
    items = re.findall(r"^- \[([ x])\] `([\w-]+)`:((?:.*\n)(?:      .*\n)*)", OWED, flags=re.M)
    return {name: (tick == "x", re.findall(r"`((?:accuracy/)?gpu/[\w.-]+)`", text)) for tick, name, text in items}


def test_owed_names_the_tasks_and_their_files(gpu, tmp_path):
    known = {task.name: task for task in gpu.tasks(gpu.Place(tmp_path))}
    assert list(owed()) == list(known)
    assert OWED.count("- [") == len(known)
    for name, (ticked, files) in owed().items():
        assert files and {Path(file).name for file in files} <= set(known[name].results.values()), name
        assert not ticked or all((ROOT / "benchmarks" / "results" / file).exists() for file in files), name
    lines = OWED.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 120
    kept = [file for task in known.values() for file in task.results.values() if not file.startswith("accuracy.")]
    assert len(set(kept)) == len(kept)  # no result takes the place of another task's


def test_commands_are_understood_by_their_scripts(gpu, load_benchmark, tmp_path):
    """At full size, where the dry run of the test below has sizes of its own."""
    parsers = {
        "step.py": lambda given: load_benchmark("step").parse(given),
        "memory.py": lambda given: load_benchmark("memory").make_parser().parse_args(given),
        "kernels.py": lambda given: load_benchmark("kernels").make_parser().parse_args(given),
        "host.py": lambda given: load_benchmark("host").make_parser().parse_args(given),
        "accuracy.py": lambda given: load_benchmark("accuracy").make_parser().parse_args(given),
        "_gpu_tests.py": lambda given: load_benchmark("_gpu_tests").parse(given),
    }
    seen = set()
    for task in gpu.tasks(gpu.Place(tmp_path, tmp_path, "9.0")):
        if task.name == "analysis":
            assert "needs finished runs" in task.missing()
            continue
        _, script, *given = task.command(200)
        assert Path(script).is_file() and task.least <= task.seconds <= 530
        if Path(script).name in parsers:
            seen.add(Path(script).name)
            parsed = parsers[Path(script).name](given)
            if task.name != "host-cost":  # which is done in one sitting
                limit = parsed.time_limit * 60 if "accuracy" in script else parsed.limit
                assert limit < 200
    assert seen == set(parsers)


def test_trainings_on_made_up_images_have_options_of_train(gpu, tmp_path):
    from _accuracy_rows import _parse
    from _gpu_train import RUNS, make_images

    for _, _, options in RUNS.values():
        given = _parse(options.split())
        assert given["amp"] in ("bf16", "fp16") and given["channels_last"] and given["epochs"] <= 3
    folder = make_images(tmp_path / "images", 8, 450, 10)
    files = list((folder / "train").glob("class*/*.jpg"))
    assert len(files) == 450 and len({path.stat().st_ino for path in files}) == 200
    assert len(list((folder / "test").glob("class*/*.jpg"))) == 10
    (folder / "done").unlink()  # begun, not ended
    assert make_images(folder, 8, 20, 10) == folder and len(list(folder.rglob("*.jpg"))) == 30


def test_what_cannot_be_run_here_is_refused(gpu, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "look", lambda environment: {"gpu": None, "torch": "2.11.0+cpu", "cuda": None})
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert "sees no GPU (it was built without CUDA" in capsys.readouterr().err
    (tmp_path / "state.json").write_text(json.dumps({"slices": [{"gpu": "H200"}], "tasks": {}}))
    monkeypatch.setattr(gpu, "look", lambda environment: {"gpu": "A100", "capability": "8.0", "torch": "2.11.0"})
    assert gpu.main(["--output", str(tmp_path)]) == 2
    assert "holds results of a H200, this is a A100: give another --output" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.main(["--output", str(tmp_path), "--only", "nothing"])
    assert "'nothing' is in no task's name: build, tests-cuda" in capsys.readouterr().err
    assert gpu.main(["--output", str(tmp_path), "--list", "--only", "kernels"]) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [
        ["build", "left"],
        ["kernels", "left"],
        ["kernels-compile", "left"],
    ]


def test_variables_that_would_change_a_measurement_are_left_out(gpu, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("PYTHONPATH", "mine")
    found = gpu.make_environment(tmp_path, dry=False)
    assert "TRITON_INTERPRET" not in found
    assert found["PYTHONPATH"].split(os.pathsep) == [str(ROOT), str(tmp_path / "site"), "mine"]


@pytest.mark.slow
def test_a_dry_run_does_everything(gpu, tmp_path, monkeypatch, capsys):
    """One task of each script, in two slices: one from another folder; one out of its archive, with forked scripts."""
    import _gpu_slices

    kinds = ["tests-cuda", "kernels-compile", "step-resnet110", "sanitizer-memcheck", "train", "rules", "step-scaling"]
    kinds += ["accuracy-short", "analysis", "host-cost"]
    options = ["--dry-run", "--archive", str(tmp_path / "back")]
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *options]
    given = ["--output", str(tmp_path / "one"), "--minutes", "9", "--only", "build", "kernels-compile"]
    first = subprocess.run([*script, *given], cwd=tmp_path, capture_output=True, text=True, timeout=1500)
    assert first.returncode == 0, first.stdout + first.stderr

    second = tmp_path / "two"
    with tarfile.open(tmp_path / "back" / "slice-1.tar.gz") as tar:
        tar.extractall(second, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # since 3.11.4
    monkeypatch.setattr(_gpu_slices, "subprocess", forked)
    status = gpu.main([*options, "--output", str(second), "--minutes", "20", "--only", *kinds])
    said = capsys.readouterr().out
    summary = json.loads((second / "summary.json").read_text())
    statuses = {task["name"]: task["status"] for task in summary["tasks"]}
    assert {name: statuses[name] for name in ["build", *kinds]} == dict.fromkeys(["build", *kinds], "done"), said
    assert statuses["step-resnet32"] == "left"
    assert status == 0 and len(summary["slices"]) == 2
    sittings = {task["name"]: [sitting["slice"] for sitting in task["sittings"]] for task in summary["tasks"]}
    assert (sittings["build"], sittings["kernels-compile"], sittings["rules"]) == ([1, 2], [1], [2])
    for task in summary["tasks"]:
        # the sanitizer's collects its tests alone, without the tool
        assert task["results"] or task["status"] == "left" or task["name"].startswith("sanitizer"), task["name"]
    assert (second / "results" / "accuracy.md").exists() and (second / "results" / "cka.csv").exists()
    assert max(path.stat().st_size for path in (tmp_path / "back").iterdir()) < 16 << 20

"""benchmarks/accuracy.py: runs that are skipped, taken up, stopped and fail; means and papers' figures.

Most runs here are those of a stand-in for the training command, which writes the same files in no time.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "accuracy.py"

HEADER = (
    "epoch,lr,train_loss,train_accuracy,local_loss_sum,test_loss,test_accuracy,images_per_second,seconds,waiting,"
    "peak_bytes"
)

# Trains nothing: an epoch takes SECONDS, its accuracy is 0.1 per epoch. DGL fails in its second epoch, the first time.
STAND_IN = f"""
import json, os, signal, sys, time
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
asked = []
signal.signal(signal.SIGINT, lambda *_: asked.append(1))
out, total, seconds = options["--output"], int(options["--epochs"]), float(os.environ.get("SECONDS", 0))
with open(out + "/started", "a") as file:
    file.write(" ".join(sys.argv[1:]) + chr(10))
open(out + "/group", "w").write(str(os.getpgrp()))
data = dict(classes=["dark", "light"], train_images=8, test_images=4, input_shape=[3, 8, 8], local_modules=3)
settings = dict(dataset="folder", width=8)
json.dump(dict(settings=settings, data=data, versions=dict(), threads=1), open(out + "/config.json", "w"))
log, checkpoint = out + "/log.csv", out + "/checkpoint.pt"
if "--resume" not in sys.argv:
    assert not os.path.exists(checkpoint)
    open(log, "w").write({HEADER + ",module_losses"!r} + chr(10))
done = len(open(log).readlines()) - 1
for epoch in range(done + 1, total + 1):
    if options["--rule"] == "dgl" and epoch == 2 and not os.path.exists(out + "/tried"):
        open(out + "/tried", "w")
        sys.exit("some words" + chr(10) + "error: the loss is nan, see " + out + "/checkpoint.pt")
    start = time.time()
    while time.time() < start + seconds and not (asked and "STUBBORN" not in os.environ):
        time.sleep(0.01)
    if asked:
        open(checkpoint, "w")
        sys.exit(130)
    row = f"{{epoch}},0.1,2,0.5,3,2,{{epoch / 10}},{{100 * epoch}},2.5,0,{{1000 + epoch}},1 1 1"
    open(log, "a").write(row + chr(10))
    open(checkpoint, "w")
"""


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("accuracy")


@pytest.fixture
def data(tmp_path):
    """An image folder of two classes, dark and light, 8 x 8 pixels."""
    return write_images(
        tmp_path / "images",
        {split: (np.repeat([60, 190], n)[:, None, None, None] + np.zeros((8, 8, 3)), np.repeat([0, 1], n))
         for split, n in (("train", 16), ("test", 4))},
        ("dark", "light"),
    )  # fmt: skip


def write_images(root, splits, names):
    for split, (pixels, labels) in splits.items():
        for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            folder = root / split / names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(image, 0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.fixture
def run(benchmark, data, tmp_path, monkeypatch):
    """The benchmark with the stand-in for the training command: exit status of a call with these options."""
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(STAND_IN)
    command = benchmark.Run.command
    monkeypatch.setattr(
        benchmark.Run, "command", lambda self, data: [sys.executable, "-S", str(stand_in), *command(self, data)[4:]]
    )

    def call(*arguments, rows=("BP", "AugLocal d=2"), epochs=3):
        options = ["--data", str(data), "--device", "cpu", "--output", str(tmp_path / "out"), "--epochs", str(epochs)]
        return benchmark.main([*options, "--rows", *rows, *arguments])

    return call


def folder(tmp_path, row, seed=1234, epochs=3):
    return tmp_path / "out" / "runs" / f"resnet8-{row}-{epochs}ep-seed{seed}"


def report(tmp_path):
    return json.loads((tmp_path / "out" / "accuracy.json").read_text())


def starts(path):
    return (path / "started").read_text().splitlines()


def stop_after(path, lines, *, times=1):
    """Ctrl-C, a real signal, once the file has so many lines; more of them half a second apart."""

    def watch():
        while not path.exists() or len(path.read_text().splitlines()) < lines:
            time.sleep(0.02)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_runs_and_reports(run, tmp_path, capsys):
    assert run("--seeds", "1", "2", "--settings", "--width 8 --batch-size 8") == 0
    bp = folder(tmp_path, "bp", 1)
    (options,) = starts(bp)
    expected = "--network resnet8 --rule bp --epochs 3 --seed 1 --device cpu --width 8 --batch-size 8"
    assert options.partition("--output ")[2] == f"{bp} {expected}"
    said = capsys.readouterr().out
    finished = re.findall(r"^resnet8, (.+?), seed (\d): last 30.00 %, best 30.00 % \(epoch 3\)", said, flags=re.M)
    assert finished == [("BP", "1"), ("AugLocal d=2", "1"), ("BP", "2"), ("AugLocal d=2", "2")]  # whole tables first

    found = report(tmp_path)
    assert {"machine", "versions", "commit", "load_average", "command"} <= set(found)
    record = found["runs"][0]
    assert record["command"] == f"python -m auglocal_ext train --data DIR --output OUTPUT {expected}"
    assert (record["train_seconds"], record["images_per_second"], record["peak_bytes"]) == (7.5, 200, 1003)
    assert (record["last_test_accuracy"], record["best_test_accuracy"], record["best_epoch"]) == (0.3, 0.3, 3)
    assert record["log"][0].endswith(",module_losses") and len(record["log"]) == 4
    assert record["wall_seconds"] == record["sittings"][0]["wall_seconds"] > 0
    table = (tmp_path / "out" / "accuracy.md").read_text()
    assert table in "# Test accuracy\n\n" + said or table.split("\n\n", 1)[1] in said
    assert "| AugLocal d=2 | 3 |     2 | 30.00 ± 0.00 | 30.00 ± 0.00 | +0.00 ± 0.00 |" in table
    assert "paper" not in table and "do not compare" not in table
    assert (tmp_path / "out" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in json.dumps(found["runs"])


def test_a_finished_run_is_left_alone(run, tmp_path, capsys):
    assert run(rows=["BP"]) == 0
    assert run() == 0
    assert len(starts(folder(tmp_path, "bp"))) == len(starts(folder(tmp_path, "auglocal-d2"))) == 1
    assert "1 of 2 runs are done already" in capsys.readouterr().out


@pytest.mark.slow
def test_ctrl_c_saves_and_the_same_command_goes_on(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SECONDS", "0.3")
    before = signal.getsignal(signal.SIGINT)
    thread = stop_after(folder(tmp_path, "bp") / "log.csv", 3)
    assert run(epochs=3) == 130
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    said = capsys.readouterr()
    assert "stopped after 2 of 3 epochs" in said.out
    # The terminal sends Ctrl-C to a whole group: a run in it would be told twice, and not save.
    assert int((folder(tmp_path, "bp") / "group").read_text()) != os.getpgrp()
    assert "0 of 2 runs are done; go on with: python" in said.err and "--rows BP" in said.err
    assert not folder(tmp_path, "auglocal-d2").exists()
    assert report(tmp_path)["tables"][0]["rows"][0]["not_done"] == ["seed 1234: stopped after 2 of 3 epochs"]
    assert not (tmp_path / "out" / "accuracy.png").exists()

    monkeypatch.setenv("SECONDS", "0")
    assert run(epochs=3) == 0
    first, second = starts(folder(tmp_path, "bp"))
    assert second == first + " --resume"
    bp = report(tmp_path)["runs"][0]
    assert bp["epochs_done"] == 3 and len(bp["sittings"]) == 2
    assert bp["wall_seconds"] == sum(sitting["wall_seconds"] for sitting in bp["sittings"])


def test_a_second_ctrl_c_does_not_wait(run, tmp_path, monkeypatch):
    monkeypatch.setenv("SECONDS", "60")
    monkeypatch.setenv("STUBBORN", "1")
    stop_after(folder(tmp_path, "bp") / "log.csv", 1, times=2)
    start = time.monotonic()
    assert run() == 130
    assert time.monotonic() - start < 30


def test_a_run_that_was_stopped_before_it_saved_begins_anew(run, tmp_path):
    assert run(rows=["BP"]) == 0
    bp = folder(tmp_path, "bp")
    (bp / "checkpoint.pt").unlink()
    state = json.loads((bp / "run.json").read_text()) | {"status": "interrupted"}
    (bp / "run.json").write_text(json.dumps(state))
    assert run(rows=["BP"]) == 0
    assert "--resume" not in starts(bp)[1] and report(tmp_path)["runs"][0]["epochs_done"] == 3


def test_time_limit(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SECONDS", "20")
    start = time.monotonic()
    assert run("--time-limit", "0.02", "--jobs", "2") == 130
    assert time.monotonic() - start < 15
    assert {entry["status"] for entry in report(tmp_path)["runs"]} == {"interrupted"}
    assert "stopping" in capsys.readouterr().err


def test_several_at_a_time_and_a_run_that_fails(run, tmp_path, capsys):
    assert run("--jobs", "3", rows=["BP", "DGL", "AugLocal d=2", "Greedy"]) == 1
    said = capsys.readouterr()
    assert "failed: resnet8, DGL, seed 1234" in said.err
    rows = {row["row"]: row for row in report(tmp_path)["tables"][0]["rows"]}
    assert [rows[name]["seeds"] for name in ("BP", "DGL", "AugLocal d=2", "Greedy")] == [[1234], [], [1234], [1234]]
    error = "the loss is nan, see OUTPUT/checkpoint.pt (exit status 1)"
    assert rows["DGL"]["not_done"] == [f"seed 1234: failed after 1 epochs: {error}"]
    assert f"- DGL, seed 1234: failed after 1 epochs: {error}" in said.out
    assert "| DGL          | 3 |     0 |       - |" in said.out
    assert "Times do not compare: several runs shared the machine." in said.out

    assert run("--jobs", "3", rows=["BP", "DGL", "AugLocal d=2", "Greedy"]) == 0  # tried again, from its checkpoint
    assert starts(folder(tmp_path, "dgl"))[1].endswith("--resume")
    assert len(starts(folder(tmp_path, "greedy"))) == 1


def test_other_settings_in_a_folder_are_an_error(run, data, tmp_path, capsys):
    assert run(rows=["BP"]) == 0
    with pytest.raises(SystemExit) as stop:
        run("--settings", "--lr 0.5", rows=["BP"])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "holds a run with other settings" in said and "now '--lr 0.5'" in said
    assert "give another --output, or delete that folder" in said
    write_images(data, {"test": ([np.zeros((8, 8, 3))] * 9, [0] * 9)}, ("dark", "light"))
    with pytest.raises(SystemExit):
        run(rows=["BP"])
    assert "'test_files': 8" in capsys.readouterr().err
    (folder(tmp_path, "bp") / "run.json").unlink()
    with pytest.raises(SystemExit):
        run(rows=["BP"])
    assert "did not make" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--settings", "--epochs 3"], "--settings has --epochs"),
        (["--settings", "--recipe bp"], "--settings has --recipe"),
        (["--settings", "--learning-rate 3"], "unrecognized arguments: --learning-rate"),
        (["--settings", "--lr -1"], "--lr must be positive"),
        (["--settings", "--depth 3"], "--depth belongs to the rule auglocal, not to bp"),
        (["--jobs", "0"], "--jobs is at least 1"),
        (["--network", "lenet"], "lenet"),
        (["--data", "nowhere"], "nowhere: no such folder"),
    ],
)
def test_wrong_options_end_with_a_message(run, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_report_only(benchmark, run, tmp_path, capsys):
    output = ["--report-only", "--output", str(tmp_path / "out")]
    assert benchmark.main(output) == 1
    assert "nothing to report" in capsys.readouterr().err
    assert run() == 0
    for file in ("accuracy.json", "accuracy.md", "accuracy.png"):
        (tmp_path / "out" / file).unlink()
    assert benchmark.main(output) == 0
    assert len(report(tmp_path)["runs"]) == 2 and (tmp_path / "out" / "accuracy.png").exists()


def test_rows_are_the_recipes_and_fit_their_networks(benchmark):
    import _accuracy_rows as rows

    from auglocal_ext.training.config import recipes
    from auglocal_ext.training.config.settings import TABLES

    def rule(options):
        return {name: v for name, v in rows._parse(shlex.split(options)).items() if name in TABLES["rule"]}

    for network in ("resnet32", "resnet110"):
        for row, recipe in (("DGL", "dgl"), ("PredSim", "predsim"), ("InfoPro", f"infopro-softmax-{network}")):
            stored = recipes.read(recipe).settings
            expected = {name: value for name, value in stored.items() if name in TABLES["rule"]}
            assert rule(rows.row_options(row, network)) == expected
        for row in rows.ROWS:
            assert rows.why_not(row, network, "--amp bf16 --channels-last") is None
    assert rule(rows.row_options("ContSup E", "resnet110"))["modules"] == 16
    assert rule(rows.row_options("Greedy", "resnet110"))["modules"] == 16
    assert "modules" not in rule(rows.row_options("ContSup E", "resnet32"))
    deep = [row for row in rows.ROWS if rows.why_not(row, "resnet8", "--width 8")]
    assert deep == ["AugLocal d=4", "AugLocal d=5", "AugLocal d=6"]


def test_rows_a_network_is_too_shallow_for_are_left_out(run, tmp_path, capsys):
    assert run(rows=["BP", "AugLocal d=5"]) == 0
    assert "AugLocal d=5 is left out for resnet8: AugLocal(depth=5) trains the last 5" in capsys.readouterr().out
    assert [entry["row"] for entry in report(tmp_path)["runs"]] == ["BP"]


def command(data, output, *arguments):
    options = ["--data", str(data), "--device", "cpu", "--output", str(output)]
    return [sys.executable, str(SCRIPT), *options, *arguments]


@pytest.mark.slow
def test_the_real_command(data, tmp_path):
    """From another folder, without an installed package."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    settings = "--width 4 --batch-size 8 --lr 0.05"
    done = subprocess.run(
        command(data, "out", "--rows", "BP", "InfoPro", "--epochs", "2", "--settings", settings, "--jobs", "2"),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    bp, infopro = report(tmp_path)["runs"]
    assert (bp["local_modules"], infopro["local_modules"]) == (1, 4)
    assert all(run["peak_bytes"] > 1e6 and run["images_per_second"] > 0 and not run["error"] for run in (bp, infopro))
    assert bp["threads"] == infopro["threads"] and len(infopro["log"][2].split(",")[11].split()) == 4
    assert "| InfoPro | 4 |" in done.stdout

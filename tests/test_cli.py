"""The command line as a user meets it: messages, exit statuses, and a real Ctrl-C."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from auglocal_ext.cli import main
from auglocal_ext.training import TrainConfig, Trainer
from auglocal_ext.training.checkpoint import load

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--network", "resnet8", "--width", "4", "--batch-size", "8", "--lr", "0.05", "--device", "cpu"]


@pytest.fixture
def images(tmp_path):
    """Two classes told by brightness, 64 training and 8 test images of 16 x 16."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 32), ("test", 4)):
        for label, name in enumerate(("dark", "light")):
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 128, (16, 16, 3)) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "images"


def rows(output):
    with (output / "log.csv").open(newline="") as file:
        times = ("images_per_second", "seconds", "waiting", "peak_bytes")
        return [{k: v for k, v in row.items() if k not in times} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "rule",
    [
        ["--rule", "bp"],
        ["--rule", "auglocal", "--depth", "2"],
        ["--rule", "contsup", "--context", "E", "--modules", "2"],
    ],
)
def test_train(images, tmp_path, capsys, rule):
    output = tmp_path / "run"
    arguments = ["train", "--data", str(images), "--output", str(output), "--epochs", "2", *SMALL, *rule]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "64 train and 8 test images of 16 x 16, 2 classes, kept on cpu" in said.out
    assert ("steps: eager (CUDA graphs need a CUDA device, this run is on cpu)" in said.out) == ("bp" not in rule)
    assert re.search(r"test accuracy: last [\d.]+%, best [\d.]+% \(epoch [12]", said.out)
    assert {file.name for file in output.iterdir()} >= {"config.json", "log.csv", "checkpoint.pt"}
    assert len(rows(output)) == 2

    assert main(arguments) == 1
    assert "holds a run: continue it with --resume" in capsys.readouterr().err
    assert main(["train", "--output", str(output), "--resume"]) == 0
    assert main([*arguments, "--resume", "--recipe", "auto"]) == 0
    assert main(["train", "--output", str(output), "--resume", "--lr", "0.5"]) == 1
    assert "--lr: 0.05 in the checkpoint, now 0.5" in capsys.readouterr().err
    assert len(rows(output)) == 2


def test_output_is_named_after_network_and_rule(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", "images", "--epochs", "1", *SMALL, "--depth", "2"]) == 0
    assert (tmp_path / "runs" / "resnet8-auglocal" / "checkpoint.pt").exists()
    assert main(["train", "--resume", "--network", "resnet8"]) == 0


def test_cut_points(images, tmp_path, capsys):
    output = tmp_path / "run"
    common = ["train", "--output", str(output), "--modules", "0,2"]
    arguments = [*common, "--data", str(images), "--epochs", "1", *SMALL, "--depth", "2"]
    assert main(arguments) == 0
    assert "3 local modules" in capsys.readouterr().out
    assert main([*common, "--resume"]) == 0


def test_how_a_step_runs_reaches_the_network(images, tmp_path, capsys):
    output = tmp_path / "run"
    arguments = ["--epochs", "1", *SMALL, "--depth", "2", "--eager", "--recompute", "all"]
    arguments += ["--graph", "off", "--no-overlap"]
    assert main(["train", "--output", str(output), "--data", str(images), *arguments]) == 0
    settings = json.loads((output / "config.json").read_text())["settings"]
    assert settings["fused"] is False and settings["recompute"] == "all"
    assert settings["graph"] == "off" and settings["overlap"] is False
    assert "steps: eager (--graph off)" in capsys.readouterr().out
    config = TrainConfig(**{**settings, "output": str(tmp_path / "other")})
    net = Trainer(config, bars=False, say=lambda line: None).network
    assert {module.recompute for module in net.local_modules} == {"all"}
    assert not any(module.fused for module in net.local_modules)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--data DIR is missing"),
        (["--data", "/no/such/folder"], "/no/such/folder: no such folder"),
        (["--resume"], "checkpoint.pt: no checkpoint to resume from"),
        (["--data", ".", "--rule", "bp", "--depth", "2"], "--depth belongs to the rule auglocal, not to bp"),
        (["--data", ".", "--rule", "bp", "--recompute", "all"], "--recompute belongs to the local rules, not to bp"),
        (["--data", ".", "--rule", "bp", "--overlap"], "--overlap belongs to the local rules, not to bp"),
    ],
)
def test_wrong_input_is_one_message_and_status_1(tmp_path, capsys, arguments, said):
    assert main(["train", "--output", str(tmp_path / "run"), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [[], ["fly"], ["train", "--depth", "few"], ["train", "--modules", "two"]])
def test_wrong_call_is_explained(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: python -m auglocal_ext" in capsys.readouterr().err


def test_help_names_every_option_group(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    said = capsys.readouterr().out
    for word in (
        "--data",
        "--resume",
        "--depth",
        "--context",
        "--no-joint-tail",
        "--amp",
        "cosine",
        "resnet110",
    ):
        assert word in said


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_then_resume_equals_an_uninterrupted_run(images, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "auglocal_ext", "train"]
    common = ["--data", str(images), *SMALL, "--depth", "2", "--epochs", "12", "--lr", "0.02"]

    def start(output, *arguments):
        return subprocess.Popen(
            [*command, "--output", str(output), *arguments],
            env=environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    run, whole = start(stopped, *common), start(straight, *common)
    try:
        deadline = time.monotonic() + 120
        while not (stopped / "checkpoint.pt").exists() and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        _, error = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, error
    assert f"go on with: python -m auglocal_ext train --output {stopped} --resume" in error
    assert "Traceback" not in error
    state = load(stopped / "checkpoint.pt")
    assert 1 <= state["progress"]["epochs"] < 12

    resumed = start(stopped, "--resume")
    output, error = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, error
    assert "epoch 12/12" in output

    _, error = whole.communicate(timeout=240)
    assert whole.returncode == 0, error
    assert rows(stopped) == rows(straight)
    weights, expected = (load(folder / "checkpoint.pt")["network"] for folder in (stopped, straight))
    assert all((weights[name] == expected[name]).all() for name in expected)

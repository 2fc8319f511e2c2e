"""The command line as a user meets it: messages, exit statuses, and a real Ctrl-C."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from auglocal_ext import __version__
from auglocal_ext.cli import main
from auglocal_ext.training import TrainConfig, Trainer
from auglocal_ext.training.run.checkpoint import load

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


@pytest.fixture(autouse=True)
def pictures_are_files(request, monkeypatch):
    """Learning curves take a third of a second to draw: an empty file stands for them, but in test_train."""
    if request.function is not test_train:
        monkeypatch.setattr("auglocal_ext.training.run.trainer.draw_run", lambda path, *_: path.touch())


def entries(block):
    """Name -> text of a block's lines, which may be broken."""
    found = {}
    for line in block.splitlines():
        name, _, text = line.partition(" ")
        if name:
            last, found[name] = name, text.strip()
        else:
            found[last] += " " + text.strip()
    return found


def rows(output):
    with (output / "log.csv").open(newline="") as file:
        times = ("images_per_second", "seconds", "waiting", "peak_bytes")
        return [{k: v for k, v in row.items() if k not in times} for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    "rule",
    [
        ["--rule", "bp"],
        ["--rule", "auglocal", "--depth", "2"],
        pytest.param(["--rule", "contsup", "--context", "E", "--modules", "2"], marks=pytest.mark.slow),
    ],
)
def test_train(images, tmp_path, capsys, rule):
    output = tmp_path / "run"
    arguments = ["train", "--data", str(images), "--output", str(output), "--epochs", "2", *SMALL, *rule]
    assert main(arguments) == 0
    said = capsys.readouterr()
    opening, table, ending = said.out.rstrip().split("\n\n")
    block = entries(opening)
    assert list(block) == ["network", "rule", "data", "memory", "device", "epochs", "lr", "output"]
    assert len(opening.splitlines()) <= 10 and max(map(len, opening.splitlines()[:-1])) <= 80
    net = Trainer(TrainConfig(**json.loads((output / "config.json").read_text())["settings"])).network
    deployed = sum(p.numel() for p in (net.export() if hasattr(net, "export") else net).parameters())
    trained = sum(p.numel() for p in net.parameters())
    assert block["network"] == f"resnet8: {trained:,} parameters trained, {deployed:,} deployed"
    assert (trained == deployed) == ("bp" in rule)
    modules = {"bp": "no local modules", "auglocal": "3 local modules; depth 2", "contsup": "2 local modules"}
    assert block["rule"].startswith(rule[1]) and modules[rule[1]] in block["rule"]
    assert block["data"] == "64 train and 8 test images of 16 x 16, 2 classes, kept on cpu"
    assert re.fullmatch(r"[\d.]+ MB at the peak of a step, predicted \(tensors alone\)", block["memory"])
    assert "steps: eager" in block["device"] and ("CUDA graphs need a CUDA device" in block["device"]) == (
        "bp" not in rule
    )
    assert block["epochs"] == "2, each of 8 steps, batch size 8" and block["output"] == str(output)
    assert block["lr"] == "0.05; short cosine, 0.0427 first, 0.00732 last; warm-up 0 epochs"
    assert [line.split()[0] for line in table.splitlines()[-2:]] == ["1/2", "2/2"]
    assert ("sum of local" in table) == ("bp" not in rule)
    found = entries(ending)
    assert re.search(r"[\d.]+% on the test images, best [\d.]+% \(epoch [12], chosen on them\)", found["accuracy"])
    for name, file in (("log", "log.csv"), ("curves", "curves.png"), ("checkpoint", "checkpoint.pt")):
        assert found[name] == str(output / file) and (output / file).stat().st_size > 0
    assert (output / "config.json").exists()
    assert len(rows(output)) == 2

    assert main(arguments) == 1
    said = capsys.readouterr()
    assert "holds a run: continue it with --resume" in said.err and not said.out
    assert main(["train", "--output", str(output), "--resume"]) == 0
    assert main([*arguments, "--resume", "--recipe", "auto"]) == 0
    assert main(["train", "--output", str(output), "--resume", "--lr", "0.5"]) == 1
    assert "--lr: 0.05 in the checkpoint, now 0.5" in capsys.readouterr().err
    assert main(["train", "--output", str(output), "--resume", "--schedule", "published"]) == 1
    assert "--schedule: 'short' in the checkpoint, now 'published'" in capsys.readouterr().err
    assert len(rows(output)) == 2


def test_output_is_named_after_network_and_rule(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", "images", "--epochs", "1", *SMALL, "--rule", "bp", "--batch-size", "64"]) == 0
    assert "each of 1 step, batch size 64" in capsys.readouterr().out
    assert (tmp_path / "runs" / "resnet8-bp" / "checkpoint.pt").exists()
    assert main(["train", "--resume", "--network", "resnet8", "--rule", "bp"]) == 0


def test_cut_points(images, tmp_path, capsys):
    output = tmp_path / "run"
    common = ["train", "--output", str(output), "--modules", "0,2"]
    arguments = [*common, "--data", str(images), "--epochs", "1", *SMALL, "--depth", "2"]
    assert main(arguments) == 0
    assert "3 local modules" in capsys.readouterr().out
    assert main([*common, "--resume"]) == 0


def test_a_rule_as_head_and_a_recipe_of_ones_own(images, tmp_path, capsys):
    output, own = tmp_path / "run", tmp_path / "own.toml"
    own.write_text(
        '[rule]\nrule = "contsup"\ncontext = "E"\nmodules = 2\n[rule.head]\nrule = "infopro"\nweights = [5, 0, 0, 1]\n'
    )
    arguments = ["train", "--recipe", str(own), "--data", str(images), "--output", str(output), "--epochs", "1", *SMALL]
    assert main([*arguments, "--context", "R1E"]) == 0
    settings = json.loads((output / "config.json").read_text())["settings"]
    assert settings["context"] == "R1E" and settings["head"] == {"rule": "infopro", "weights": [5, 0, 0, 1]}
    assert settings["recipe_file"] == str(own) and settings["recipe"] == "cifar10"
    rule = entries(capsys.readouterr().out.split("\n\n")[0])["rule"]
    assert rule == "contsup: 2 local modules; widen 1, init own, context R1E, head infopro:weights=5,0,0,1"
    assert main([*arguments, "--context", "R1E", "--resume"]) == 0
    assert main([*arguments, "--head", "infopro:weights=5,0,0,2", "--context", "R1E", "--resume"]) == 1
    assert "--head: 'infopro:weights=5,0,0,1' in the checkpoint" in capsys.readouterr().err
    assert main(["train", "--output", str(output), "--resume", "--recipe", "contsup"]) == 1
    assert f"--recipe: '{own}' in the checkpoint, now 'contsup'" in capsys.readouterr().err
    own.unlink()
    assert main(["train", "--output", str(output), "--resume"]) == 0


def test_printed_settings_are_a_recipe(images, tmp_path, capsys):
    arguments = ["--data", str(images), "--rule", "dgl", "--epochs", "1", *SMALL]
    assert main(["train", *arguments, "--config"]) == 0
    printed = capsys.readouterr().out
    assert 'rule = "dgl"\ninit = "own"\nhead = "mlp-sr"\n' in printed and 'warmup = 0\nschedule = "short"\n' in printed
    assert not (tmp_path / "runs").exists()
    (tmp_path / "printed.toml").write_text(printed)
    assert main(["train", "--recipe", str(tmp_path / "printed.toml"), "--config"]) == 0
    assert capsys.readouterr().out == printed

    settings = []
    for name, given in (("a", arguments), ("b", ["--recipe", str(tmp_path / "printed.toml")])):
        assert main(["train", *given, "--output", str(tmp_path / name)]) == 0
        settings.append(json.loads((tmp_path / name / "config.json").read_text())["settings"])
        settings[-1] |= {"output": "", "recipe_file": ""}
    assert settings[0] == settings[1]
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_settings_without_images(capsys):
    assert main(["train", "--recipe", "infopro", "--dataset", "stl10", "--modules", "8", "--config"]) == 0
    printed = capsys.readouterr().out
    assert (
        'base = "stl10"\n' in printed
        and 'schedule = "published"\n' in printed
        and "weights = [20.0, 0.2, 5.0, 1.0]\n" in printed
        and "batch_size = 128\n" in printed
    )
    assert "data =" not in printed
    assert main(["train", "--recipe", "auglocal-imagenet", "--config"]) == 0
    assert 'network = "resnet34"\n' in capsys.readouterr().out
    assert main(["train", "--recipe", "dgl", "--config"]) == 1
    assert "--config needs --data DIR or --dataset NAME" in capsys.readouterr().err


def test_recipes_are_listed(capsys):
    assert main(["train", "--list-recipes"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"^infopro-balanced +InfoPro\* \(contrast\) on ResNet-110", listed, re.M)
    assert "files to copy and change: " in listed


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
        (["--data", ".", "--recipe", "infpro"], "did you mean infopro?"),
        (["--data", ".", "--rule", "man", "--head", "auglocal:deep=3"], "'deep=3' is no option of auglocal"),
        (["--data", ".", "--rule", "bp", "--overlap"], "--overlap belongs to the local rules, not to bp"),
    ],
)
def test_wrong_input_is_one_message_and_status_1(tmp_path, capsys, arguments, said):
    assert main(["train", "--output", str(tmp_path / "run"), *arguments]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and "Traceback" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fly"], "argument COMMAND: invalid choice: 'fly'"),
        (["train", "--depth", "few"], "argument --depth: expected a whole number, got 'few'"),
        (["train", "--modules", "two"], "argument --modules: expected a number"),
        (
            ["train", "--recompute", "0"],
            "argument --recompute: expected one of none, auxiliary, all, peak, or a number",
        ),
        (["plan", "--batch-size", "8", "--recompute", "1,,2"], "argument --recompute: expected one of none"),
        (["train", "--weights", "1,x"], "argument --weights: expected numbers"),
        (["train", "--dept", "2", "--colour", "red"], "unrecognized arguments: --colour red"),
        (["plan"], "the following arguments are required: --batch-size"),
        (["analyze"], "the following arguments are required: --checkpoint"),
    ],
)
def test_a_wrong_call_is_an_error_and_a_line_of_usage(capsys, arguments, said):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    error, usage, options = capsys.readouterr().err.splitlines()
    command = "" if arguments == ["fly"] else f" {arguments[0]}"
    assert error.startswith(f"error: {said}")
    assert usage.startswith(f"usage: python -m auglocal_ext{command} ") and len(usage) <= 100
    assert options == f"options: python -m auglocal_ext{command} --help"


def test_without_a_command_it_says_what_there_is(capsys):
    assert main([]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) == 12 and max(map(len, lines)) <= 80 and said.err == ""
    for command in ("train", "analyze", "plan", "info"):
        assert any(line.startswith(f"{command} ") for line in lines)
        (example,) = re.findall(rf"python -m auglocal_ext ({command} .*|{command})$", said.out, re.M)
        # the example is understood: it fails, if at all, for what DIR and RUN stand for
        if command in ("plan", "info"):
            small = ["--network", "resnet8", "--width", "4", "--depth", "2"] if command == "plan" else []
            assert main([*shlex.split(example), *small]) == 0
        else:
            assert main(shlex.split(example)) == 1
            assert capsys.readouterr().err.startswith(("error: DIR: no such folder", "error: runs/resnet32-auglocal: "))
    assert "README.md" in lines[-1]


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"auglocal_ext {__version__}\n"


def test_a_diverged_run_ends_with_status_1_and_its_curves(images, tmp_path, capsys, monkeypatch):
    evaluate = Trainer.evaluate

    def wrecked(self):
        reading = evaluate(self)
        return replace(reading, loss=float("nan")) if self._done.epochs == 1 else reading

    monkeypatch.setattr(Trainer, "evaluate", wrecked)
    output = tmp_path / "run"
    arguments = ["train", "--data", str(images), "--output", str(output), "--epochs", "2", *SMALL, "--rule", "bp"]
    assert main(arguments) == 1
    error, where = capsys.readouterr().err.splitlines()
    assert error.startswith("error: the test loss is nan after epoch 2: ") and "holds the run after epoch 1)" in error
    assert where == f"learning curves so far: {output / 'curves.png'}" and (output / "curves.png").exists()
    assert load(output / "checkpoint.pt")["progress"]["epochs"] == 1


@pytest.mark.parametrize("flag", ["--shard", "--sync-batch-norm", "--gather-features"])
def test_options_of_replicas_are_refused_where_there_is_one(flag, tmp_path, capsys):
    assert main(["train", "--data", str(tmp_path), "--output", str(tmp_path / "run"), flag]) == 1
    assert f"{flag} is for several replicas: add --replicas R, or leave it out" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


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
        "--weights",
        "--list-recipes",
        "--amp",
        "cosine",
        "resnet110",
    ):
        assert word in said


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_then_resume_equals_an_uninterrupted_run(images, tmp_path, capsys, one_thread):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "auglocal_ext", "train"]
    common = ["--data", str(images), *SMALL, "--depth", "2", "--epochs", "12", "--lr", "0.02"]

    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    run = subprocess.Popen(
        [*command, "--output", str(stopped), *common],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
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
    stop_said, state = error, load(stopped / "checkpoint.pt")
    assert 1 <= state["progress"]["epochs"] < 12

    assert main(["train", "--output", str(stopped), "--resume"]) == 0
    output = capsys.readouterr().out
    assert "\n12/12 " in output and "; resumes after " in output
    assert f"learning curves so far: {stopped / 'curves.png'}" in stop_said

    assert main(["train", "--output", str(straight), *common]) == 0
    assert rows(stopped) == rows(straight)
    weights, expected = (load(folder / "checkpoint.pt")["network"] for folder in (stopped, straight))
    assert all((weights[name] == expected[name]).all() for name in expected)

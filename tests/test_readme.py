"""The README's examples run as written, its commands are the ones CI runs, its figures those of the result files."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F

from auglocal_ext import AugLocal, LocalSequential, models

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_the_example_runs():
    (example,) = blocks("python")
    names: dict = {}
    exec(compile(example.replace("randn(64,", "randn(4,").replace("(64,)", "(4,)"), "README.md", "exec"), names)
    assert names["logits"].shape == (4, 10) and names["out"].module_losses.shape == (names["net"].num_modules,)
    assert not torch.equal(names["logits"], names["out"].logits)  # after the update


def test_before_and_after_are_true():
    (diff,) = blocks("diff")
    lines = diff.splitlines()
    x, y = torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))
    for sign in "-+":
        layers = models.resnet20()
        names = {"F": F, "layers": layers, "net": layers, "x": x, "y": y, "LocalSequential": LocalSequential}
        names |= {"AugLocal": AugLocal, "optimizer": torch.optim.SGD(layers.parameters(), lr=0.1)}
        before = next(layers.parameters()).clone()
        exec("\n".join(line[2:] for line in lines if line[0] in (sign, " ")), names)
        assert names["logits"].shape == (4, 10) and not torch.equal(next(layers.parameters()), before)


def test_it_stays_short():
    lines = README.splitlines()
    assert len(lines) <= 130 and max(map(len, lines)) <= 120


def test_ci_runs_the_commands_as_written():
    commands = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    assert "pip install . && python benchmarks/memory.py" in commands
    assert "pip install '.[test]' && pytest" in commands
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install -q '.[test]' && pytest" in script


def test_tables_and_figures_are_those_of_the_result_files(load_benchmark, capsys):
    assert load_benchmark("tables").main(["--check"]) == 0, capsys.readouterr().err

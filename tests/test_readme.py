"""The README's examples run as written, its commands are the ones CI runs, its figures those of the result files."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_the_examples_run():
    first, second, third = [
        block for block in blocks("python") if block.startswith(("import torch", "from auglocal_ext"))
    ]
    names: dict = {}

    def run(example: str) -> None:
        small = example.replace("torch.randn(64,", "torch.randn(4,").replace("(64,)", "(4,)")
        exec(compile(small, "README.md", "exec"), names)

    run(first)
    assert names["logits"].shape == (4, 10)
    assert not torch.equal(names["logits"], names["out"].logits)  # after the optimizer's step
    assert names["plain"](names["x"]).shape == (4, 10)
    run(second)
    assert torch.equal(names["logits"], names["out"].logits)  # the step's own forward came first
    assert names["scheduler"].optimizer is names["step"].optimizer
    run(third)
    assert names["similarity"].shape == (17, 17) and names["probe"].name == "classifier"


def test_ci_runs_the_commands_as_written():
    commands = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    assert "pip install . && python benchmarks/memory.py" in commands
    assert "pip install '.[test]' && pytest" in commands
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install -q '.[test]' && pytest" in script


def test_tables_and_figures_are_those_of_the_result_files(load_benchmark, capsys):
    assert load_benchmark("tables").main(["--check"]) == 0, capsys.readouterr().err

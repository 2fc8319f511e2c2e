"""The guide's pages do as they say: their Python runs, their commands parse, their tables are complete."""

from __future__ import annotations

import argparse
import csv
import re
import shlex
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from auglocal_ext.cli import analyze, info, main, plan, train
from auglocal_ext.models import NAMES
from auglocal_ext.rules import RULES
from auglocal_ext.training.config import recipes
from auglocal_ext.training.config.rule_options import RULE_OPTIONS
from auglocal_ext.training.run.logs import EpochRow

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGES = ("get-started", "using", "training", "questions")


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.S | re.M)


def commands(text: str) -> list[list[str]]:
    """Every ``python -m auglocal_ext`` of the bash blocks, split as a shell does, redirections left out."""
    lines = "\n".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()
    found = [
        shlex.split(line.split(" > ")[0], comments=True) for line in lines if line.startswith("python -m auglocal_ext ")
    ]
    return [words[3:] for words in found]


def make_parser() -> tuple[argparse.ArgumentParser, argparse._SubParsersAction]:
    parser = argparse.ArgumentParser()
    subparsers = parser.add_subparsers(dest="command", required=True)
    for command in (analyze, info, plan, train):
        command.add_parser(subparsers)
    return parser, subparsers


def run(name: str, names: dict) -> dict:
    """The page's Python blocks in order, in one namespace, with batches of 4 in place of 64."""
    for number, block in enumerate(blocks(page(name), "python")):
        small = re.sub(r"(randn\(|randint\(0, \d+, \()64", r"\g<1>4", block)
        exec(compile(small, f"{name}.md, block {number}", "exec"), names)
    return names


def photos(root: Path) -> None:
    """The image folder of the pages: two classes of 16 and 8 images."""
    for split, count in (("train", 16), ("test", 8)):
        for label, name in enumerate(("cat", "dog")):
            folder = root / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(100 * label + i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


def test_get_started():
    names = run("get-started", {})
    assert names["net"].num_modules == 5
    assert names["net"].primary is names["layers"]
    assert names["out"].module_losses.shape == (5,) and not names["out"].loss.requires_grad
    assert type(names["plain"]) is torch.nn.Sequential and names["plain"](names["x"]).shape == (4, 10)


@pytest.mark.slow
def test_using(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    # Port 0 is a free one: one that is found free here may be taken before the page listens to it.
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}.items():
        monkeypatch.setenv(name, str(value))
    names = run("using", {})
    assert 1 in names["plan"].recompute and names["step"].eager_reason
    assert torch.load("network.pt").keys() == names["wrap"](num_classes=10).primary.state_dict().keys()


def test_questions():
    names = run("questions", {})
    peaks = {
        name: names["peak"](names[name])
        for name in ("backpropagation", "one_backward_at_the_end", "a_backward_per_module")
    }
    summed = peaks["one_backward_at_the_end"] / peaks["backpropagation"]
    assert 0.99 < summed < 1.01  # "The first two have the same peak."
    assert peaks["a_backward_per_module"] < 0.5 * peaks["backpropagation"]


def test_training_command_and_what_it_leaves(monkeypatch, tmp_path, capsys):
    """The first run of get-started.md, for an epoch; then the Python of training.md, which reads it."""
    monkeypatch.chdir(tmp_path)
    photos(tmp_path)
    first = next(words for words in commands(page("get-started")) if words[0] == "train")
    assert main([*first, "--epochs", "1", "--workers", "0"]) == 0
    shown = next(block for block in blocks(page("get-started"), "text") if block.startswith("network "))
    printed = capsys.readouterr().out.split("\n\n")[0]
    assert re.findall(r"^\w+", shown, flags=re.M) == re.findall(r"^\w+", printed, flags=re.M)
    files = {path.name for path in Path("runs/first").iterdir()}
    drawn = re.search(r"^runs/first/\n(.*?)^```", page("get-started"), flags=re.S | re.M)
    assert drawn is not None and files == set(re.findall(r"── ([\w.]+)", drawn[1]))
    with open("runs/first/log.csv", newline="") as file:
        header = next(csv.reader(file))
    assert documented("training", "The columns of `log.csv`:")[: len(header)] == header
    names = run("training", {})
    assert names["logits"].shape == (1, 2) and names["summary"].best_epoch in (1, 2)


def documented(name: str, above: str) -> list[str]:
    """The first cells of the table below a line, without code marks."""
    table = page(name).split(above)[1].split("\n\n")[1].splitlines()[2:]
    return [line.split("|")[1].strip().strip("`") for line in table]


def test_columns_of_the_log():
    assert documented("training", "The columns of `log.csv`:") == [field.name for field in fields(EpochRow)]


def test_rules_and_their_options():
    lines = re.findall(r"^\| (`[a-z`, ]+`) \| (`--.*?|none) \|$", page("training"), flags=re.M)
    said = {
        rule: set(re.findall(r"--[\w-]+", options)) for names, options in lines for rule in re.findall(r"\w+", names)
    }
    assert said == {
        rule: {"--" + name.replace("_", "-") for name in options} - {"--modules", "--head"}
        for rule, options in RULE_OPTIONS.items()
    }


def test_every_option_of_train_is_on_the_page():
    _, commands = make_parser()
    known = {option for action in commands.choices["train"]._actions for option in action.option_strings}
    known -= {"-h", "--help"} | {option for option in known if option.startswith("--no-")}
    said = set(re.findall(r"`(--[\w-]+)", page("training")))
    assert known <= said, known - said
    assert said - known <= {"--help"}, said - known


def test_recipes_and_networks():
    table = re.findall(r"^\| (`[\w`, -]+`) \| .*", page("training").split("| recipe |")[1].split("\n\n")[0], flags=re.M)
    assert {name for cell in table for name in re.findall(r"[\w-]+", cell)} == set(recipes.names())
    networks = page("training").split("`--network` is one of")[1].split("The optimizer")[0]
    assert set(re.findall(r"`((?:resnet|vgg|vit_)\w+)`", networks)) == set(NAMES)
    assert set(RULE_OPTIONS) == {*RULES, "bp"}


def test_a_recipe_of_ones_own(tmp_path):
    (tmp_path / "mine.toml").write_text(blocks(page("training"), "toml")[0])
    settings = recipes.read(str(tmp_path / "mine.toml")).settings
    assert (settings["rule"], settings["depth"], settings["epochs"], settings["lr"]) == ("auglocal", 4, 20, 0.4)


@pytest.mark.parametrize("name", PAGES)
def test_commands_parse(name, capsys):
    parser, _ = make_parser()
    for words in commands(page(name)):
        try:
            parser.parse_args(words)
        except SystemExit:
            pytest.fail(f"{name}.md: {' '.join(words)}: {capsys.readouterr().err}")


def test_the_extras_that_pages_name_exist():
    text = (DOCS.parent / "pyproject.toml").read_text()
    extras = set(re.findall(r"^(\w+) = \[", text.split("[project.optional-dependencies]")[1], flags=re.M))
    for name in PAGES:
        assert set(re.findall(r"pip install '\.\[(\w+)\]'", page(name))) <= extras


@pytest.mark.parametrize(
    "name", ["index", "kernels", *(pytest.param(n, marks=pytest.mark.slow) for n in ("memory", "analyses"))]
)
def test_the_python_of_other_pages_runs(name):
    assert run(name, {})


def test_commands_of_other_pages_parse():
    parser, _ = make_parser()
    for words in commands(page("memory")) + commands((DOCS.parent / "README.md").read_text()):
        parser.parse_args(words)

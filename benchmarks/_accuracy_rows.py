"""The rows of ``benchmarks/accuracy.py``: learning rules as options of ``python -m auglocal_ext train``."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NoReturn

import torch

from auglocal_ext.cli import train
from auglocal_ext.layers import group_children
from auglocal_ext.models import build
from auglocal_ext.training import SettingsError, TrainConfig
from auglocal_ext.training.config import recipes
from auglocal_ext.training.config.recipes import DATA_RECIPES
from auglocal_ext.training.config.rule_options import write_head
from auglocal_ext.training.config.settings import TABLES
from auglocal_ext.training.config.train_config import make_rule
from auglocal_ext.training.config.values import write

AUGLOCAL_DEPTHS = (2, 3, 4, 5, 6)


def recipe_options(name: str) -> str:
    """The rule of a recipe as options of ``train``."""
    words = []
    for key, value in recipes.read(name).settings.items():
        if key not in TABLES["rule"]:
            continue
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", write_head(value) if key == "head" else write(value)]
    return " ".join(words)


#: DGL, PredSim and InfoPro as in AugLocal's tables, on every network.
ROWS = {
    "BP": "--rule bp",
    **{f"AugLocal d={depth}": f"--rule auglocal --depth {depth}" for depth in AUGLOCAL_DEPTHS},
    "ContSup R0": "--rule contsup --context R0",
    "ContSup E": "--rule contsup --context E",
    "ContSup R1E": "--rule contsup --context R1E",
    "DGL": recipe_options("dgl"),
    "PredSim": recipe_options("predsim"),
    "InfoPro": recipe_options("infopro-softmax-resnet32"),
    "Greedy": "--rule greedy",
    "MAN": "--rule man",
    "MAN + DGL": "--rule man --head dgl",
}
_OF_NETWORK = {
    ("InfoPro", "resnet110"): recipe_options("infopro-softmax-resnet110"),
}

MODULES = 16
"""Local modules, at most, of the rows whose papers cut deep networks into so many of equal counts."""

_IN_MODULES = ("ContSup R0", "ContSup E", "ContSup R1E", "Greedy")

# What the benchmark itself sets, per run.
_OWN = ("data", "output", "resume", "recipe", "list_recipes", "config", "network", "rule", "epochs", "seed", "device")


def row_options(row: str, network: str) -> str:
    """The rule of a row as options of ``train``."""
    options = _OF_NETWORK.get((row, network), ROWS[row])
    if row in _IN_MODULES and _layers(network) > MODULES:
        options += f" --modules {MODULES}"
    return options


def check_settings(settings: str) -> None:
    """SettingsError for what ``train`` does not understand, and for what each run has of its own."""
    given = _parse(shlex.split(settings))
    if given.get("recipe", "auto") in DATA_RECIPES:
        given.pop("recipe")  # a data set's training, such as SVHN's for images that lie in folders
    if own := [name for name in _OWN if given.get(name)]:
        names = ", ".join("--" + name.replace("_", "-") for name in own)
        raise SettingsError(f"--settings has {names}, which each run has of its own: see this command's options")


def why_not(row: str, network: str, settings: str) -> str | None:
    """Why the network cannot be trained by the row's rule, or None; SettingsError if the settings are wrong."""
    given = _parse([*shlex.split(settings), "--network", network, *shlex.split(row_options(row, network))])
    config = TrainConfig(data="", output="", **given)
    rule = make_rule(config)
    if rule is None:
        return None
    try:
        rule.ends(_layers(network, config.width), config.modules)
    except ValueError as error:
        return str(error)
    return None


def _layers(network: str, width: int | None = None) -> int:
    with torch.random.fork_rng(devices=[]):
        return len(group_children(build(network, width=width)))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise SettingsError(f"train does not understand --settings: {message}")


def _parse(arguments: Sequence[str]) -> dict[str, Any]:
    """What is given, by the options' names."""
    parser = _Parser(add_help=False)
    train.add_parser(parser.add_subparsers())
    parsed = vars(parser.parse_args(["train", *arguments]))
    known = {field.name for field in fields(TrainConfig)}
    return {name: value for name, value in parsed.items() if value is not None and (name in known or value)}

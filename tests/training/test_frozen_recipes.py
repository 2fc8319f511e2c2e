"""Every recipe makes the rule and the settings that are recorded in ``frozen_recipes.json``, on every data set."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from auglocal_ext.rules import Rule
from auglocal_ext.training import SettingsError, TrainConfig
from auglocal_ext.training.config import recipes
from auglocal_ext.training.config.rule_options import OPTIONS
from auglocal_ext.training.config.train_config import make_rule, resolve

RECORDED = json.loads(Path(__file__).with_name("frozen_recipes.json").read_text())
DATA_SETS = ("cifar10", "svhn", "stl10", "folder")
_OF_THE_RUN = ("data", "output", "dataset", "recipe_file", "device", *OPTIONS)


def text(rule):
    """A rule with what it does not have by default."""
    said = [
        f"{each.name}={text(value) if isinstance(value, Rule) else repr(value)}"
        for each in fields(rule)
        if (value := getattr(rule, each.name)) != each.default or each.default is MISSING
    ]
    return f"{type(rule).__name__}({', '.join(said)})"


def recorded(name, dataset):
    made = TrainConfig.from_recipe(name, data=".", output="run", device="cpu")
    try:
        config = resolve(made, dataset, streamed=False)
    except SettingsError as error:
        return str(error).partition(":")[0]
    rule = make_rule(config)
    others = {
        each.name: value
        for each in fields(config)
        if each.name not in _OF_THE_RUN and (value := getattr(config, each.name)) != each.default
    }
    return {"modules": config.modules, "made": "bp" if rule is None else text(rule), **others}


def test_no_recipe_is_missing():
    assert set(RECORDED) == {f"{name} on {dataset}" for name in recipes.names() for dataset in DATA_SETS}


@pytest.mark.parametrize("name", recipes.names())
def test_recipes_make_what_is_recorded(name):
    for dataset in DATA_SETS:
        assert json.loads(json.dumps(recorded(name, dataset))) == RECORDED[f"{name} on {dataset}"]

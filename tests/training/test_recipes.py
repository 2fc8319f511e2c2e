"""Recipes: what the shipped ones say, how files are read, and the round trip of --config."""

from __future__ import annotations

from argparse import ArgumentParser
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import get_type_hints

import pytest
from runs import trainer

from auglocal_ext.cli import main
from auglocal_ext.cli.network_options import add_settings
from auglocal_ext.layers import group_children
from auglocal_ext.models import build
from auglocal_ext.training import RECIPES, SettingsError, TrainConfig
from auglocal_ext.training.config import recipes
from auglocal_ext.training.config.language_models import OF_TEXT
from auglocal_ext.training.config.recipes import DATA_RECIPES
from auglocal_ext.training.config.rule_options import OPTIONS
from auglocal_ext.training.config.settings import SETTINGS, TABLES
from auglocal_ext.training.config.train_config import differences, make_rule, resolve, to_recipe

MAN_HEAD = {
    "rule": "infopro",
    "loss": "softmax",
    "weights": (5, 0.5, 0, 0),
    "stage_steps": 14,
    "init": "released",
    "head": "2c2f",
}

# name: data set, network, local modules, epochs, batch, peak rate, and settings of the rule
SHIPPED = [
    ("auglocal", "cifar10", "resnet32", 11, 400, 1024, 0.8, {"depth": 6, "pyramid": 0.5}),
    ("auglocal", "stl10", "resnet32", 11, 400, 128, 0.1, {"depth": 6, "flip": True, "padding_mode": "zero"}),
    ("auglocal-imagenet", "folder", "resnet34", 17, 200, 1024, 0.4, {"single_layer_norm": False, "warmup": 0}),
    ("bp", "svhn", "resnet32", 1, 400, 1024, 0.8, {"flip": False, "padding": 2}),
    ("dgl", "svhn", "resnet32", 16, 400, 1024, 0.8, {"head": "mlp-sr-auglocal"}),
    (
        "predsim",
        "cifar10",
        "resnet32",
        16,
        400,
        1024,
        0.8,
        {"beta": 0.99, "limit": 512, "scale_classifier": False, "zero_padding": True, "init": "auglocal"},
    ),
    (
        "man",
        "cifar10",
        "resnet32",
        15,
        400,
        1024,
        0.8,
        {"average_momentum": 0.995, "init": "released", "head": MAN_HEAD, "modules": tuple(range(1, 15))},
    ),
    (
        "infopro-softmax-resnet32",
        "cifar10",
        "resnet32",
        16,
        400,
        1024,
        0.8,
        {"loss": "softmax", "weights": (5, 0.05, 0.2, 0.5), "init": "released"},
    ),
    ("infopro-softmax-resnet110", "cifar10", "resnet110", 55, 400, 1024, 0.8, {"weights": (5, 0, 0.5, 1)}),
    ("infopro", "svhn", "resnet110", 16, 160, 1024, 0.8, {"loss": "contrast_batch", "init": "released"}),
    ("infopro-balanced", "stl10", "resnet110", 4, 160, 128, 0.1, {"weights": (20, 0.5, 10, 1)}),
    ("greedy", "cifar10", "resnet110", 16, 160, 1024, 0.8, {"warmup": 10}),
    ("contsup", "cifar10", "resnet32", 16, 160, 1024, 0.8, {"init": "released", "head": "1c2f"}),
    (
        "contsup-contrast",
        "cifar10",
        "resnet32",
        16,
        160,
        1024,
        0.8,
        {"context": "R1E", "head": {"rule": "infopro", "loss": "contrast_batch", "weights": (0, 1, 0, 1)}},
    ),
    (
        "contsup-decoder",
        "stl10",
        "resnet110",
        16,
        160,
        128,
        0.1,
        {"head": {"rule": "infopro", "loss": "contrast_batch", "init": "released", "weights": (20, 0.5, 10, 0.1)}},
    ),
]


def resolved(recipe, dataset, **settings):
    made = TrainConfig.from_recipe(recipe, **{"data": ".", "output": "run", "device": "cpu", **settings})
    return resolve(made, dataset, False)


@pytest.mark.parametrize(
    ("name", "dataset", "network", "modules", "epochs", "batch_size", "lr", "others"),
    SHIPPED,
    ids=lambda v: str(v)[:25],
)
def test_shipped_recipes(name, dataset, network, modules, epochs, batch_size, lr, others):
    settings = resolved(name, dataset)
    expected = {"network": network, "epochs": epochs, "batch_size": batch_size, "lr": lr, "recipe_file": name, **others}
    assert {key: getattr(settings, key) for key in expected} == expected
    rule = make_rule(settings)
    layers = len(group_children(build(network)))
    assert modules == (1 if rule is None else len(rule.ends(layers, settings.modules)))
    assert (settings.momentum, settings.weight_decay) == (0.9, 1e-4)


def test_every_shipped_recipe_is_tested_and_has_a_title():
    assert {row[0] for row in SHIPPED} | set(DATA_RECIPES) == set(recipes.names())
    assert all(20 < len(recipes.title(name)) < 120 for name in recipes.names())


def test_tables_hold_every_setting_once_with_its_type():
    known = [name for table in TABLES.values() for name in table]
    apart = {"output", "recipe", "recipe_file"}
    assert sorted(known) == sorted({field.name for field in fields(TrainConfig)} - apart)
    hints = get_type_hints(TrainConfig)
    for table in TABLES.values():
        for name, kind in table.items():
            assert hints[name] in (kind, kind | None), name


@pytest.mark.parametrize("name", [each.name for each in SETTINGS.values() if each.least is not None or each.positive])
def test_bounds_are_those_that_the_setting_declares(config, name):
    setting = SETTINGS[name]
    config = partial(config, network="gpt", width=None, workers=None) if name in OF_TEXT else config
    least = 0 if setting.positive else setting.least
    with pytest.raises(SettingsError, match=f"{setting.flag} must be .*, got {least - (not setting.positive)}$"):
        config(**{name: least - (not setting.positive)})
    if setting.least is not None:
        assert getattr(config(**{name: least}), name) == least
        with pytest.raises(SettingsError, match=f"{setting.flag} must be at most {setting.most}, got"):
            config(**{name: setting.most + 1})


@pytest.mark.parametrize("name", [each.name for each in SETTINGS.values() if each.choices])
def test_choices_are_those_that_the_setting_declares(config, name):
    setting = SETTINGS[name]
    config = partial(config, network="gpt", width=None, workers=None) if name in OF_TEXT else config
    for choice in setting.choices:
        assert getattr(config(**{"rule": "auglocal", name: choice}), name) == choice
    with pytest.raises(SettingsError, match=f"{setting.flag} is one of {', '.join(setting.choices)}, not 'x'"):
        config(**{name: "x"})


def test_the_command_line_has_every_setting_that_declares_a_help():
    parser = ArgumentParser()
    for table in TABLES:
        add_settings(parser, table)
    options = {action.dest: action for action in parser._actions}
    assert set(options) - {"help"} == {each.name for each in SETTINGS.values() if each.help is not None}
    assert options["lr"].type("0.5") == 0.5 and options["stage_cuts"].type("3,5") == (3, 5)
    assert parser.parse_args([]).shard is None and parser.parse_args(["--no-shard"]).shard is False
    assert set(SETTINGS) - set(options) == {
        *OPTIONS,
        *("network", "width", "rule", "fused"),  # cli.network_options adds these, for the command plan too
        *(each.name for each in SETTINGS.values() if not each.option),
    }


def test_data_recipes_are_files_of_the_same_kind():
    assert RECIPES["svhn"].augmentation.padding == 2 and RECIPES["stl10"].batch_size == 128
    assert resolved("svhn", "cifar10").padding == 2
    direct = resolve(TrainConfig(data=".", output="run", recipe="svhn", device="cpu"), "cifar10", False)
    assert direct == resolved("svhn", "cifar10")


def test_a_recipe_by_name_is_no_data_sets_own():
    with pytest.raises(SettingsError, match="recipe is one of auto, .* TrainConfig.from_recipe"):
        TrainConfig(data=".", output="run", recipe="infopro")


def test_a_run_of_a_version_without_a_setting_resumes():
    assert differences({"lr": 0.1}, {"lr": 0.1, "padding": 4}) == []
    assert differences({"lr": 0.1, "padding": None}, {"lr": 0.1, "padding": 4}) != []
    assert differences({"lr": 0.1}, {"lr": 0.1, "mixup": None}) == []
    assert differences({"lr": 0.1}, {"lr": 0.1, "mixup": 0.2}) != []


def test_given_settings_go_first():
    assert resolved("auglocal", "cifar10", depth=None).depth == 6
    settings = resolved("auglocal", "cifar10", depth=3, network="resnet110", lr=0.2)
    assert (settings.depth, settings.network, settings.lr) == (3, "resnet110", 0.2)
    settings = resolved("auglocal", "cifar10", rule="bp")
    assert (settings.rule, settings.depth) == ("bp", None)
    assert resolved("contsup", "cifar10", rule="greedy", network="resnet20").modules is None


@pytest.mark.parametrize(("epochs", "warmup"), [(None, 10), (40, 10), (8, 2), (3, 0)])
def test_epochs_rescale_the_schedule(tmp_path, epochs, warmup):
    given = {} if epochs is None else {"epochs": epochs}
    assert resolved("infopro", "cifar10", **given).warmup == warmup
    own = tmp_path / "own.toml"
    own.write_text("[optimisation]\nwarmup = 10\nepochs = 160\n")
    assert resolved(str(own), "cifar10", **given).warmup == warmup


def test_the_schedule_goes_with_the_number_of_epochs(tmp_path):
    assert resolved("infopro", "cifar10").schedule == "published"
    assert resolved("infopro", "cifar10", epochs=99).schedule == "short"
    assert resolved("infopro", "cifar10", epochs=8, schedule="published").schedule == "published"
    own = tmp_path / "own.toml"
    own.write_text('[optimisation]\nepochs = 8\nschedule = "published"\n')
    assert resolved(str(own), "cifar10").schedule == "published"
    assert resolved(str(own), "cifar10", epochs=2).schedule == "short"  # the file's was for its own number
    with pytest.raises(SettingsError, match="--schedule is one of published, short, not 'linear'"):
        resolved("infopro", "cifar10", schedule="linear")


def test_a_files_own_warmup_is_kept(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text("[optimisation]\nwarmup = 4\nepochs = 8\n")
    assert resolved(str(own), "cifar10").warmup == resolved(str(own), "cifar10", epochs=8).warmup == 4


@pytest.mark.parametrize("said", ["stages = 2", "replicas = 2"])
def test_numbers_of_processes_in_a_recipe_are_not_dropped(tmp_path, capsys, said):
    own = tmp_path / "own.toml"
    own.write_text(f"[processes]\n{said}\n")
    assert main(["train", "--recipe", str(own), "--data", str(tmp_path), "--output", str(tmp_path / "run")]) == 1
    assert "is for 2 processes and this is one; start them with: torchrun" in capsys.readouterr().err
    config = resolved(str(own), "cifar10")
    assert said in to_recipe(config) and to_recipe(config).count(" = 2\n") == 1


def test_a_file_of_ones_own(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text(
        '# mine\n[recipe]\nbase = "contsup-decoder"\n[rule]\nmodules = [15]   # one cut\ncontext = "E"\n'
        '[augmentation]\nmean = [1, 2, 3]\npadding_mode = "zero"\n[step]\nfused = false\noverlap = false\n'
        "[processes]\nstages = 2\nstage_cuts = [1]\n"
    )
    settings = resolved(str(own), "cifar10")
    assert (settings.modules, settings.context, settings.mean) == ((15,), "E", (1, 2, 3))
    assert (settings.padding_mode, settings.fused, settings.overlap) == ("zero", False, False)
    assert (settings.epochs, settings.network, settings.recipe) == (160, "resnet110", "cifar10")
    weights = {"weights": (5, 0.1, 0, 0)}
    assert settings.head == {"rule": "infopro", "loss": "contrast_batch", "init": "released"} | weights
    assert (settings.stage_cuts, type(settings.stage_cuts[0])) == ((1,), int)
    assert settings.recipe_file == str(own)


def test_a_file_without_a_rule_keeps_its_options_for_the_one_that_is_given(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text('[rule]\nmodules = 4\ncontext = "E"\n')
    settings = resolved(str(own), "cifar10", rule="contsup")
    assert (settings.modules, settings.context) == (4, "E")


def test_a_file_with_another_rule_than_its_base_has_none_of_its_options(tmp_path):
    own = tmp_path / "own.toml"
    own.write_text('[recipe]\nbase = "contsup-decoder"\n[rule]\nrule = "dgl"\n')
    settings = recipes.read(str(own)).settings
    assert settings["rule"] == "dgl" and not settings.keys() & {"head", "context", "modules"}
    assert settings["network"] == "resnet110"


@pytest.mark.parametrize(
    ("recipe", "dataset", "settings"),
    [
        ("auto", "cifar10", {}),
        ("bp", "stl10", {"seed": 7, "channels_last": True}),
        ("dgl", "cifar10", {"memory_budget": "0.4GiB"}),
        ("auglocal", "svhn", {"downsampling": False, "fused": False, "lr": 1e-5, "amp": "bf16"}),
        ("infopro-balanced", "cifar10", {"modules": (15,)}),
        ("contsup-decoder", "svhn", {"modules": 4, "epochs": 8, "warmup": 4}),
        ("contsup", "svhn", {"head": "auglocal:depth=3,pyramid=0", "network": "resnet20", "width": 8, "modules": 4}),
        ("contsup", "cifar10", {"head": "infopro:head=man:head=dgl", "modules": 16}),
        ("man", "svhn", {"head": "dgl", "data": 'a "b" \\ c\n\x7f\u00e9'}),
        ("auglocal-imagenet", "folder", {"image_size": 64, "train_images": 100, "workers": 0}),
    ],
)
def test_the_printed_settings_are_a_recipe_of_the_same_run(tmp_path, recipe, dataset, settings):
    first = resolved(recipe, dataset, **settings)
    printed = tmp_path / "printed.toml"
    printed.write_text(to_recipe(first))
    made = TrainConfig.from_recipe(str(printed), output="run")
    again = resolve(made, dataset, False)
    assert asdict(replace(again, recipe_file=None)) == asdict(replace(first, recipe_file=None))
    assert to_recipe(again) == to_recipe(first)
    assert asdict(replace(made, recipe_file=None)) == asdict(replace(first, recipe_file=None))  # nothing was left open


def test_a_run_by_a_recipe_stores_its_settings_and_resumes(config, separable, tmp_path):
    own = tmp_path / "own.toml"
    own.write_text(
        '[network]\nnetwork = "resnet8"\nwidth = 4\n[rule]\nrule = "dgl"\n[optimisation]\nepochs = 1\nlr = 0.05\n'
    )
    settings = TrainConfig.from_recipe(
        str(own), data="unused", output=str(tmp_path / "run"), batch_size=8, device="cpu"
    )
    run = trainer(settings, separable)
    run.fit()
    stored = run.describe()["settings"]
    assert stored["recipe_file"] == str(own) and stored["rule"] == "dgl" and stored["padding"] == 4
    assert stored["mean"] == [125.3, 123.0, 113.9]
    own.write_text('[rule]\nrule = "bp"\n')  # a run's settings are its own
    again = trainer(TrainConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}), separable)
    again.resume()
    assert again.config == run.config


def test_recipes_are_installed_with_the_package():
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert '"auglocal_ext.training.config.recipes" = ["*.toml"]' in text

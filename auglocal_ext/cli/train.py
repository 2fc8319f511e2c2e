"""``python -m auglocal_ext train``: a run from the command line."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..distributed import DisagreementError
from ..training import (
    RECIPES,
    CheckpointError,
    DivergedError,
    Interrupted,
    SettingsError,
    TrainConfig,
    Trainer,
    TrainingError,
)
from ..training.config import recipes
from ..training.config.rule_options import RULE_OPTIONS
from ..training.config.schedule import PUBLISHED_FROM
from ..training.config.train_config import differences, from_dict, resolve, to_recipe, with_recipe
from ..training.data.datasets import ImageFiles, detect, load_data
from ..training.errors import RecipeError
from ..training.paths import user_path
from ..training.run.processes import Launch
from ..training.run.run_folder import refuse_unusable
from ..training.run.run_lock import refuse_used
from ..training.run.saving import find, read, refuse_earlier_run
from ..training.run.stored import taken_from
from ..training.run.trainer import CHECKPOINT, CURVES
from .network_options import add_network_options, add_settings, window_as_context
from .opening import ending, opening
from .spelling import as_options

_USAGE = "python -m auglocal_ext train --data DIR [--network NAME] [--rule NAME] [options]"

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells expect it (128 + SIGINT); after SIGTERM it is 143."""

#: The groups of options, by the table of a recipe.
_GROUPS = {
    "data": "data",
    "network": "network and rule",
    "step": "step",
    "optimisation": "optimisation",
    "augmentation": "augmentation",
    "processes": "several processes, started by torchrun",
}

_RECIPES = "; ".join(
    f"{name}: batch {recipe.batch_size}, lr {recipe.lr:g}, {recipe.epochs} epochs, "
    + (f"{recipe.warmup} of them warm-up" if recipe.warmup else "no warm-up")
    for name, recipe in RECIPES.items()
    if recipe.augmentation is not None
)
_OF_TEXT = RECIPES["text"]

_EPILOG = f"""
Options left out take the value of the recipe, otherwise of the data set's own recipe (SGD with Nesterov momentum,
cosine per epoch; {_RECIPES}), else of the rule. --epochs rescales the schedule; the warm-up is at most a quarter of the
run. From {PUBLISHED_FROM} epochs on the schedule is the published one, whose last epoch has the rate 0; shorter runs
take each rate in the middle of its epoch, so that every epoch trains. A language model is trained by AdamW with a
cosine per step (batch {_OF_TEXT.batch_size}, lr {_OF_TEXT.lr:g}, {_OF_TEXT.epochs} epochs, {_OF_TEXT.warmup_steps}
steps of warm-up). With --resume, options left out take the value of the interrupted run.

torchrun --nproc-per-node N -m auglocal_ext train ... trains in N processes, see --stages and --replicas. With
--max-restarts they go on from the last checkpoint after one of them has died.
"""


def add_parser(subparsers: Any) -> None:
    """Adds ``train``. Every option's default is None, which tells what was given from what was not."""
    parser = subparsers.add_parser(
        "train",
        usage=_USAGE,
        help="train a network on real images, or a language model on a text",
        description="Train a network by a local learning rule or by backpropagation, on an image folder "
        "(train/<class>/*, test/<class>/*), on images and masks (train/images/*, train/masks/*.png, the same in "
        "test/), or on torchvision's CIFAR-10, SVHN or STL-10 files; or a language model on a text file or a folder of "
        ".txt files.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--recipe", metavar="NAME|FILE", help="an experiment's settings, or a file's; other options override them")
    add("--list-recipes", action="store_true", help="name the recipes and the folder they are in, then stop")
    add("--config", action="store_true", help="print all settings, as a file for --recipe, then stop")
    add("--output", metavar="DIR", help="run folder (default runs/NETWORK-RULE)")
    add("--resume", action="store_true", help="go on with the run in --output where it stopped")

    for table, title in _GROUPS.items():
        group = parser.add_argument_group(title)
        if table == "network":
            add_network_options(group, tuple(RULE_OPTIONS))
        add_settings(group, table)


def run(arguments: argparse.Namespace) -> int:
    """Trains; 0 when all epochs are done, 130 after Ctrl-C and 143 after SIGTERM.

    1 with a message for divergence, wrong data or settings, and a folder that cannot be written.
    """
    launch = Launch()
    try:
        return launch.leave(_run(arguments, launch))
    except Exception as error:
        if launch.size == 1:
            raise
        launch.crash(error)
        return launch.leave(1)


def _run(arguments: argparse.Namespace, launch: Launch) -> int:
    trainer: Trainer | None = None
    options = {field.name: getattr(arguments, field.name, None) for field in fields(TrainConfig)}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        given = window_as_context(given)
        launch.meet()
        if arguments.list_recipes:
            return _list_recipes() if launch.rank == 0 else 0
        settings = with_recipe(given.get("recipe", "auto"), given)
        network, rule = settings.get("network", TrainConfig.network), settings.get("rule", TrainConfig.rule)
        settings.setdefault("output", f"runs/{network.replace(':', '-')}-{rule}")
        given["output"] = settings["output"]
        if arguments.config:
            if launch.rank == 0:
                print(_described(settings), end="")
            return 0
        output = user_path(given["output"])
        launch.grid(arguments.stages, arguments.replicas)  # before anything else, as far as the options say it
        refuse_unusable(output)
        if launch.rank == 0:
            refuse_used(output)
        resume = arguments.resume or launch.restarted(output) and find(output) is not None
        config = _config(settings, given, resume, launch)
        _refuse_alone(given, config)
        team = None
        if launch.size > 1:
            team = launch.join(config.stages, config.replicas, launch.device(config.device))
            config = replace(config, device=team.device.type)
        say = _say if launch.rank == 0 else _unsaid
        trainer = Trainer(config, say=say, team=team)
        if resume:
            trainer.resume()
        launch.begins(output)
        say(opening(trainer))
        if trainer.extension:
            say(trainer.extension)
        if trainer.memory_plan is not None:
            say(f"\n{trainer.memory_plan}")
        say("")
        summary = trainer.fit()
    except Interrupted as stop:
        if launch.rank == 0:
            command = f"{_command(trainer)} train --output {shlex.quote(given['output'])} --resume"
            print(f"\n{stop}\n{_curves(trainer)}go on with: {command}", file=sys.stderr)
        if trainer is not None:
            trainer.team.wait()  # the first to end has torchrun end the others
        return 128 + stop.signal
    except KeyboardInterrupt:
        if launch.rank == 0:
            print("\nstopped without saving; what was saved before is unharmed", file=sys.stderr)
        return INTERRUPTED
    except DivergedError as error:
        launch.fail(f"{error}\n{_curves(trainer)}".rstrip())
        return 1
    except RecipeError as error:  # in the words of the file
        launch.fail(str(error))
        return 1
    except (TrainingError, DisagreementError) as error:
        launch.fail(as_options(str(error), options, ("graph",)))
        return 1
    say(f"\n{ending(trainer, summary)}")
    return 0


def _refuse_alone(given: dict[str, Any], config: TrainConfig) -> None:
    """SettingsError for options of several replicas where there is one; a run's own are kept for other grids."""
    for name in ("sync_batch_norm", "shard", "gather_features"):
        if given.get(name) and config.replicas == 1:
            flag = "--" + name.replace("_", "-")
            raise SettingsError(f"{flag} is for several replicas: add --replicas R, or leave it out")


def _command(trainer: Trainer | None) -> str:
    """What has started this run."""
    size = 1 if trainer is None else trainer.team.size
    return "python -m auglocal_ext" if size == 1 else f"torchrun --nproc-per-node {size} -m auglocal_ext"


def _unsaid(line: str) -> None:
    """Of all processes one speaks."""


def _say(line: str) -> None:
    """At once, also into a file or a pipe: a run takes hours."""
    try:
        print(line, flush=True)
    except UnicodeEncodeError:  # a sample of text may hold any character
        encoding = sys.stdout.encoding
        print(line.encode(encoding, "replace").decode(encoding), flush=True)


def _curves(trainer: Trainer | None) -> str:
    """Where the learning curves so far are, a line if there are any."""
    path = None if trainer is None else trainer.output / CURVES
    return f"learning curves so far: {path}\n" if path is not None and path.exists() else ""


def _list_recipes() -> int:
    for name in recipes.names():
        print(f"{name:26} {recipes.title(name)}")
    print(f"\nfiles to copy and change: {recipes.find('cifar10').parent}")
    return 0


def _described(settings: dict[str, Any]) -> str:
    """The settings a run would have, as a recipe file."""
    config = from_dict({"data": "", **settings})
    dataset, streamed = config.dataset, False
    if dataset == "auto" and config.data:
        dataset = detect(user_path(config.data), text=config.on_text)
    elif dataset == "auto":
        if config.recipe == "auto":
            raise SettingsError("--config needs --data DIR or --dataset NAME: the recipe is the data set's own")
        dataset = "folder" if config.recipe == "imagenet" else config.recipe
    if dataset == "folder" and config.recipe == "auto" and config.data:
        streamed = isinstance(load_data(config.data, dataset, image_size=config.image_size), ImageFiles)
    resolved = resolve(config, dataset, streamed)
    return to_recipe(resolved if config.data else replace(resolved, data=""))


def _config(settings: dict[str, Any], given: dict[str, Any], resume: bool, launch: Launch) -> TrainConfig:
    output = user_path(given["output"])
    if resume:
        path = find(output) or output / CHECKPOINT
        stored = read(path)["settings"]
        with taken_from(path, "settings"):
            return _resumed(path, stored, settings, given, launch)
    if "data" not in settings:
        raise SettingsError("--data DIR is missing: the folder with the images, or for --network gpt a text")
    refuse_earlier_run(output)  # Trainer.fit would, after the images are loaded
    stages, replicas = launch.grid(settings.get("stages"), settings.get("replicas"))
    return from_dict({**settings, "stages": stages, "replicas": replicas})


def _resumed(
    path: Path, stored: dict[str, Any], settings: dict[str, Any], given: dict[str, Any], launch: Launch
) -> TrainConfig:
    """The settings of a checkpoint, with those given that may be other ones."""
    before = stored.get("stages", 1), stored.get("replicas", 1)
    grid = launch.grid(given.get("stages"), given.get("replicas"), before)
    if grid[0] != before[0]:
        stored = {**stored, "stage_cuts": None}
    if launch.size > 1:  # each has its own
        stored = {**stored, "device": stored["device"].partition(":")[0]}
    given = {**given, "stages": grid[0], "replicas": grid[1]}
    given = {name: value for name, value in given.items() if value != "auto"}
    if "recipe_file" in settings:
        given.pop("recipe")
        given["recipe_file"] = settings["recipe_file"]
    if changed := differences(stored, given):
        raise CheckpointError(f"{path} belongs to a run with other settings:\n  " + "\n  ".join(changed))
    return from_dict(stored | given | {"network_weights": None})  # the checkpoint has the weights

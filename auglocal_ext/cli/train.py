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
    CheckpointError,
    DivergedError,
    Interrupted,
    SettingsError,
    TrainConfig,
    Trainer,
    TrainingError,
    recipes,
)
from ..training.config import AMP, GRAPH, RECOMPUTE_CHOICES, differences, from_dict, resolve, to_recipe, with_recipe
from ..training.data import DATASETS, ImageFiles, detect, load_data
from ..training.processes import Launch
from ..training.rule_options import RULE_OPTIONS
from ..training.run_folder import refuse_unusable
from ..training.run_lock import refuse_used
from ..training.saving import find, read, refuse_earlier_run
from ..training.schedule import SCHEDULES
from ..training.stored import taken_from
from ..training.trainer import CHECKPOINT, CURVES
from ..training.values import user_path
from .network_options import add_network_options
from .opening import ending, opening
from .spelling import as_options, size, whole

_USAGE = "python -m auglocal_ext train --data DIR [--network NAME] [--rule NAME] [options]"

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells expect it (128 + SIGINT); after SIGTERM it is 143."""

_EPILOG = """
Options left out take the value of the recipe, otherwise of the data set's own recipe (SGD with Nesterov momentum 0.9,
weight decay 1e-4, cosine per epoch; cifar10 and svhn: batch 1024, lr 0.8, 400 epochs, 10 of them warm-up; stl10: the
same with batch 128, lr 0.1; imagenet: batch 1024, lr 0.4, 200 epochs, no warm-up; masks: batch 8, lr 0.01, 30 epochs,
no warm-up), else of the rule. --epochs rescales
the schedule; the warm-up is at most a quarter of the run. From 100 epochs on the schedule is the published one, whose
last epoch has the rate 0; shorter runs take each rate in the middle of its epoch, so that every epoch trains. With
--resume, options left out take the value of the interrupted run.

torchrun --nproc-per-node N -m auglocal_ext train ... trains in N processes, see --stages and --replicas. With
--max-restarts they go on from the last checkpoint after one of them has died.
"""


def add_parser(subparsers: Any) -> None:
    """Adds ``train``. Every option's default is None, which tells what was given from what was not."""
    parser = subparsers.add_parser(
        "train",
        usage=_USAGE,
        help="train a network on real images",
        description="Train a network by a local learning rule or by backpropagation, on an image folder "
        "(train/<class>/*, test/<class>/*), on images and masks (train/images/*, train/masks/*.png, the same in "
        "test/), or on torchvision's CIFAR-10, SVHN or STL-10 files.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--recipe", metavar="NAME|FILE", help="an experiment's settings, or a file's; other options override them")
    add("--list-recipes", action="store_true", help="name the recipes and the folder they are in, then stop")
    add("--config", action="store_true", help="print all settings, as a file for --recipe, then stop")
    add("--output", metavar="DIR", help="run folder (default runs/NETWORK-RULE)")
    add("--resume", action="store_true", help="go on with the run in --output where it stopped")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", metavar="DIR", help="the images (required unless --resume)")
    add("--dataset", choices=DATASETS, help="what lies in --data; auto: by the files there (default)")
    add(
        "--image-size",
        type=whole,
        metavar="N",
        help="resize the images of a folder to N x N, read from disk each epoch",
    )
    add(
        "--train-images",
        type=whole,
        metavar="N",
        help="train on N images drawn once, the same ones for equal --seed",
    )
    add(
        "--workers",
        type=whole,
        metavar="N",
        help="processes that read images (default: one per core, at most 16)",
    )

    group = parser.add_argument_group("network and rule")
    add_network_options(group, tuple(RULE_OPTIONS))
    add = group.add_argument
    add(
        "--network-weights",
        metavar="FILE",
        help="begin with published weights: a state dict in the format of torch.save or safetensors",
    )
    add(
        "--recompute",
        choices=RECOMPUTE_CHOICES,
        help="what runs a second time to save memory (default none); peak: only in the modules that need the most",
    )
    add(
        "--memory-budget",
        type=size,
        metavar="SIZE",
        help="such as 0.4GiB: the cheapest recomputation whose predicted step fits; the plan is printed",
    )
    add(
        "--graph",
        choices=tuple(GRAPH),
        help="run a local rule's step as one CUDA graph; auto (default): where it can be captured, and say why not",
    )
    add(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="run a local module's backward beside the next one's forward, on two CUDA streams, with the "
        "activations of two modules alive at a time",
    )

    group = parser.add_argument_group("optimisation")
    add = group.add_argument
    add("--epochs", type=whole, metavar="N", help="of the whole run; with --resume they may be others than before")
    add("--batch-size", type=whole, metavar="N")
    add("--lr", type=float, metavar="X", help="peak learning rate")
    add("--weight-decay", type=float, metavar="X")
    add("--warmup", type=whole, metavar="N", help="epochs of linear warm-up")
    add(
        "--schedule",
        choices=SCHEDULES,
        help="of the rate: published (the papers' cosine, default from 100 epochs on) or short (no epoch at rate 0, "
        "default below)",
    )
    add(
        "--mixup",
        type=float,
        metavar="A",
        help="mix images in pairs, shares from Beta(A, A); labels become probabilities",
    )
    add("--cutmix", type=float, metavar="A", help="the same by rectangles; with both, either is drawn for each batch")
    add("--seed", type=whole, metavar="N", help="default 1234")
    add("--amp", choices=tuple(AMP), help="mixed precision (default none)")
    add("--channels-last", action="store_const", const=True, help="store images and activations channels last")
    add("--device", metavar="NAME", help="auto (default), cpu, cuda, cuda:1, ...")

    group = parser.add_argument_group("several processes, started by torchrun")
    add = group.add_argument
    add(
        "--stages",
        type=whole,
        metavar="S",
        help="runs of local modules, each trained by processes of its own (default 1)",
    )
    add(
        "--replicas",
        type=whole,
        metavar="R",
        help="processes that share each batch of --batch-size images (default: all processes divided by --stages)",
    )
    add(
        "--stage-cuts",
        type=_cuts,
        metavar="I,J,..",
        help="first local module of each stage but the first (default: stages of about equal FLOPs)",
    )
    add(
        "--sync-batch-norm",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="BatchNorm takes its statistics over all replicas, as one process does over the batch",
    )
    add(
        "--shard",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="replicas share parameters, gradients and optimizer state instead of each holding all of them",
    )
    add(
        "--gather-features",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="losses that compare images (predsim, infopro's contrast) see those of all replicas",
    )


def _cuts(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers joined by commas, got {text!r}") from None


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
    print(line, flush=True)


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
        dataset = detect(user_path(config.data))
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
        raise SettingsError("--data DIR is missing: the folder with the images")
    refuse_earlier_run(output)  # Trainer.fit would, after the images are loaded
    stages, replicas = launch.grid(given.get("stages"), given.get("replicas"))
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

"""``python -m auglocal_ext train``: a run from the command line."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from ..models import NAMES
from ..rules import AugLocal, ContSup
from ..training import CheckpointError, Interrupted, SettingsError, TrainConfig, Trainer, TrainingError
from ..training import checkpoint as checkpoints
from ..training.config import AMP, GRAPH, RECOMPUTE_CHOICES, RULE_OPTIONS, differences, from_dict
from ..training.data import DATASETS
from ..training.recipes import RECIPES
from ..training.trainer import CHECKPOINT

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells expect it (128 + SIGINT)."""

_EPILOG = """
Options left out take the value of the data set's recipe (--recipe) or of the rule. Recipes: SGD with Nesterov
momentum 0.9, weight decay 1e-4, cosine per epoch; cifar10 and svhn: batch 1024, lr 0.8, 400 epochs, 10 of
them warm-up; stl10: the same with batch 128, lr 0.1; imagenet: batch 1024, lr 0.4, 200 epochs, no warm-up.
The default warm-up is at most a quarter of the run. With --resume, options left out take the value of the
interrupted run.
"""


def add_parser(subparsers: Any) -> None:
    """Adds ``train``. Every option's default is None, which tells what was given from what was not."""
    parser = subparsers.add_parser(
        "train",
        help="train a network on real images",
        description="Train a network by AugLocal, ContSup or backpropagation, on an image folder "
        "(train/<class>/*, test/<class>/*) or on torchvision's CIFAR-10, SVHN or STL-10 files.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--output", metavar="DIR", help="run folder (default runs/NETWORK-RULE)")
    add("--resume", action="store_true", help="go on with the run in --output where it stopped")

    group = parser.add_argument_group("data")
    add = group.add_argument
    add("--data", metavar="DIR", help="the images (required unless --resume)")
    add("--dataset", choices=DATASETS, help="what lies in --data; auto: by the files there (default)")
    add(
        "--image-size",
        type=int,
        metavar="N",
        help="resize the images of a folder to N x N, read from disk each epoch",
    )
    add(
        "--train-images",
        type=int,
        metavar="N",
        help="train on N images drawn once, the same ones for equal --seed",
    )
    add(
        "--workers",
        type=int,
        metavar="N",
        help="processes that read images (default: one per core, at most 16)",
    )

    group = parser.add_argument_group("network and rule")
    add = group.add_argument
    add("--network", choices=NAMES, metavar="NAME", help=f"{', '.join(NAMES)} (default resnet32)")
    add("--width", type=int, metavar="N", help="width of a CIFAR ResNet's first stage (default 16)")
    add(
        "--rule",
        choices=tuple(RULE_OPTIONS),
        help="default auglocal; bp: backpropagation of the same network",
    )
    add(
        "--modules",
        type=_modules,
        metavar="K|I,J,..",
        help="number of local modules, or index of the last layer of each but the last",
    )
    add(
        "--depth",
        type=int,
        metavar="D",
        help=f"auglocal: layers of an auxiliary network with its classifier (default {AugLocal.depth})",
    )
    add(
        "--pyramid",
        type=float,
        metavar="TAU",
        help=f"auglocal: slope of the pyramidal depth, 0..1 (default {AugLocal.pyramid})",
    )
    add(
        "--no-joint-tail",
        dest="joint_tail",
        action="store_const",
        const=False,
        help="auglocal: one module per layer up to the last, instead of training the last D layers jointly",
    )
    add("--context", metavar="C", help=f"contsup: R0, E, R1, R1E, R2, R4, R8, R16, ... (default {ContSup.context})")
    add(
        "--head",
        metavar="H",
        help=f"contsup: 0c1f, 0c2f, 1c1f, 1c2f, 1c3f, 2c2f (default {ContSup.head}); auglocal: linear (default), vgg",
    )

    add(
        "--eager",
        dest="fused",
        action="store_const",
        const=False,
        help="torch's own layers instead of fused ones, which save memory (and on a CPU not always time)",
    )
    add(
        "--recompute",
        choices=RECOMPUTE_CHOICES,
        help="what runs a second time to save memory (default none); peak: only in the modules that need the most",
    )
    add(
        "--memory-budget",
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
    add("--recipe", choices=("auto", *RECIPES), help="default auto: the data set's own")
    add("--epochs", type=int, metavar="N")
    add("--batch-size", type=int, metavar="N")
    add("--lr", type=float, metavar="X", help="peak learning rate")
    add("--weight-decay", type=float, metavar="X")
    add("--warmup", type=int, metavar="N", help="epochs of linear warm-up")
    add("--seed", type=int, metavar="N", help="default 1234")
    add("--amp", choices=tuple(AMP), help="mixed precision (default none)")
    add("--channels-last", action="store_const", const=True, help="store images and activations channels last")
    add("--device", metavar="NAME", help="auto (default), cpu, cuda, cuda:1, ...")


def _modules(text: str) -> int | tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, or numbers joined by commas, got {text!r}") from error
    return numbers if "," in text else numbers[0]


def run(arguments: argparse.Namespace) -> int:
    """Trains; 0 when all epochs are done, 130 after Ctrl-C, 1 with a message for wrong data or settings."""
    options = {field.name: getattr(arguments, field.name) for field in fields(TrainConfig)}
    given = {name: value for name, value in options.items() if value is not None}
    network, rule = given.get("network", TrainConfig.network), given.get("rule", TrainConfig.rule)
    given.setdefault("output", f"runs/{network}-{rule}")
    try:
        trainer = Trainer(_config(given, arguments.resume))
        if arguments.resume:
            trainer.resume()
        _introduce(trainer)
        summary = trainer.fit()
    except Interrupted as stop:
        command = f"python -m auglocal_ext train --output {shlex.quote(given['output'])} --resume"
        print(f"\n{stop}\ngo on with: {command}", file=sys.stderr)
        return INTERRUPTED
    except KeyboardInterrupt:
        print("\nstopped without saving; what was saved before is unharmed", file=sys.stderr)
        return INTERRUPTED
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"test accuracy: last {summary.last_accuracy:.2%}, best {summary.best_accuracy:.2%} (epoch "
        f"{summary.best_epoch}, chosen on the test set); {summary.train_seconds:,.1f} s of training, "
        f"peak {summary.peak_bytes / 1e6:,.0f} MB; see {trainer.output}"
    )
    return 0


def _config(given: dict[str, Any], resume: bool) -> TrainConfig:
    if resume:
        path = Path(given["output"]).expanduser() / CHECKPOINT
        stored = checkpoints.load(path)["settings"]
        given = {name: value for name, value in given.items() if value != "auto"}
        if changed := differences(stored, given):
            raise CheckpointError(f"{path} belongs to a run with other settings:\n  " + "\n  ".join(changed))
        given = stored | given
    elif "data" not in given:
        raise SettingsError("--data DIR is missing: the folder with the images")
    return from_dict(given)


def _introduce(trainer: Trainer) -> None:
    config, facts = trainer.config, trainer.describe()["data"]
    size = " x ".join(map(str, facts["input_shape"][1:]))
    where = f"kept on {trainer.device}" if facts["in_memory"] else "read from disk"
    print(
        f"data: {facts['train_images']:,} train and {facts['test_images']:,} test images of {size}, "
        f"{len(facts['classes'])} classes, {where}"
    )
    modules = facts["local_modules"]
    print(
        f"network: {config.network}, rule {config.rule}, {modules} local module{'s' if modules > 1 else ''}; "
        f"{config.epochs} epochs, batch {config.batch_size}, lr {config.lr:g}, warm-up {config.warmup}; "
        f"output {trainer.output}"
    )
    if plan := trainer.plan():
        print(plan)
    sys.stdout.flush()

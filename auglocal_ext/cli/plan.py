"""``python -m auglocal_ext plan``: the memory of a training step, predicted; what to recompute for less; stages."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from ..local_modules import Recompute
from ..local_sequential import LocalSequential
from ..models import default_input_shape, gpt, network_by_name
from ..planning import StagePlan, plan_memory, plan_stages
from ..rules import Greedy
from ..step import MemoryPlan
from ..tasks import LanguageModelling, Task
from ..training import SettingsError, TrainConfig
from ..training.config.language_models import network_options
from ..training.config.recomputation import read_recompute
from ..training.config.rule_options import RULE_OPTIONS
from ..training.config.settings import AMP, RECOMPUTE_HELP
from ..training.config.train_config import make_rule
from ..training.data.text_files import BYTES
from ..training.run.networks import cut, task_of
from ..training.run.optimizers import BETAS, parameter_groups
from .network_options import add_network_options, add_settings, recomputation, window_as_context
from .opening import rule_text
from .show import show
from .spelling import as_options, size, too_large, whole

_EPILOG = """
The step is that of the command train: SGD with Nesterov momentum and weight decay, of a language model AdamW, each
module stepped as soon as its gradients are there. Only bytes of tensors are predicted, without library workspaces. It
needs neither a GPU nor data. With --stages a table shows what each process would compute, hold and send; no process is
started.
"""


def add_parser(subparsers: Any) -> None:
    """Adds ``plan``."""
    parser = subparsers.add_parser(
        "plan",
        usage="python -m auglocal_ext plan --batch-size N [--network NAME] [--rule NAME] [options]",
        help="predict the memory of a training step, and choose what to recompute",
        description="Predict the memory of each local module in a training step, and choose what runs a second time "
        "so that the step's peak is lowest, or within a budget.",
        epilog=_EPILOG,
    )
    group = parser.add_argument_group("network and rule")
    add_network_options(group, tuple(RULE_OPTIONS))
    add_settings(group, "network", without=("network_weights",))
    add = parser.add_argument_group("step").add_argument
    add("--batch-size", type=whole, metavar="N", required=True)
    add("--image-size", type=whole, metavar="N", help="images of N x N (default: what the network was designed for)")
    add(
        "--classes",
        type=whole,
        metavar="N",
        help="default 10 for CIFAR networks, 1000 for ImageNet ones, 21 for segmentation; of gpt the vocabulary, "
        "default 256",
    )
    add("--amp", choices=tuple(AMP), help="mixed precision (default none)")
    add("--channels-last", action="store_const", const=True, help="store images and activations channels last")
    add(
        "--recompute",
        type=recomputation,
        metavar="WHAT",
        help=RECOMPUTE_HELP,
    )
    add(
        "--memory-budget",
        type=size,
        metavar="SIZE",
        help="the least recomputation that fits SIZE: 400MB, 0.4GiB, ... or bytes",
    )
    add(
        "--overlap",
        choices=("auto", "on", "off"),
        default="auto",
        help="two modules at a time; auto: if the budget allows it without more recomputation (default)",
    )
    add = parser.add_argument_group("several processes").add_argument
    add("--stages", type=whole, metavar="S", help="split the network over S processes, with balanced FLOPs")
    add(
        "--replicas",
        type=whole,
        metavar="R",
        help="copies of each stage, which share each batch of --batch-size images (default 1)",
    )
    add("--shard", action="store_true", help="divide parameters, gradients and optimizer state among replicas")


def run(arguments: argparse.Namespace) -> int:
    """Prints the table; 1 with a message for wrong settings and for a budget that nothing fits."""
    try:
        show(_plan(arguments))
        return 0
    except (SettingsError, ValueError) as error:
        said = as_options(str(error), vars(arguments), ("overlap",))
    except RuntimeError as error:
        said = too_large(error)
    print(f"error: {said}", file=sys.stderr)
    return 1


def _plan(arguments: argparse.Namespace) -> str:
    """What is planned, in a line, and the table."""
    given = {
        field.name: value
        for field in fields(TrainConfig)
        if field.name not in ("recompute", "overlap") and (value := getattr(arguments, field.name, None)) is not None
    }
    config = TrainConfig(data="", output="", **window_as_context(given))
    rule = make_rule(config)
    recompute = read_recompute(arguments.recompute or "none")
    recomputes = recompute != "none" or arguments.memory_budget is not None
    if rule is None and (recomputes or arguments.overlap == "on"):
        raise SettingsError("--recompute, --memory-budget and --overlap belong to the local rules, not to bp")
    many = arguments.stages is not None or arguments.replicas is not None or arguments.shard
    if many:
        if rule is None:
            raise SettingsError("--stages, --replicas and --shard belong to the local rules, not to bp")
        if recompute == "peak" or arguments.memory_budget is not None or arguments.overlap == "on":
            raise SettingsError(
                "--recompute peak, --memory-budget and --overlap are for one process: leave them out with --stages, "
                "--replicas and --shard"
            )
    network, task, shape = _network(arguments, config)
    if rule is None:  # one module, which is backpropagation, on torch's own layers as train runs it
        net = cut(network, Greedy(), task, shape, 1, fused=False)
    else:
        net = cut(network, rule, task, shape, config.modules, fused=config.fused)
    if config.channels_last:
        net.to(memory_format=torch.channels_last)
    width = "" if config.width is None else f", width {config.width}"
    size = f"windows of {shape[0]} tokens" if config.on_text else " x ".join(map(str, shape))
    subject = f"{config.network}{width} on {size}, {task.outputs} outputs\n{rule_text(config, net.num_modules)}"
    return f"{subject}\n{_planned(arguments, config, net, many)}"


def _network(arguments: argparse.Namespace, config: TrainConfig) -> tuple[nn.Module, Task, tuple[int, ...]]:
    """The network with its task and the shape of an input."""
    if config.on_text:
        options = network_options(vars(config))
        task = LanguageModelling(BYTES if arguments.classes is None else arguments.classes)
        return gpt(vocab_size=task.outputs, **options), task, (options["context"],)
    task_of_images = task_of(config.network, arguments.classes)
    network = network_by_name(config.network, task_of_images.outputs, width=config.width, image_size=config.image_size)
    shape = default_input_shape(config.network)
    if config.image_size is not None:
        shape = (shape[0], config.image_size, config.image_size)
    return network, task_of_images, shape


def _planned(
    arguments: argparse.Namespace, config: TrainConfig, net: LocalSequential, many: bool
) -> MemoryPlan | StagePlan:
    budgeted = arguments.memory_budget is not None
    if many:
        replicas = 1 if arguments.replicas is None else arguments.replicas
        if replicas > 0 and arguments.batch_size % replicas:
            raise SettingsError(
                f"--batch-size {arguments.batch_size} does not divide into {replicas} replicas: it is that of all "
                "replicas together, as in train"
            )
        return plan_stages(
            net,
            arguments.batch_size // max(1, replicas),
            partial(_optimizer, config.on_text),
            stages=1 if arguments.stages is None else arguments.stages,
            replicas=replicas,
            shard=arguments.shard,
            autocast=AMP[config.amp],
            recompute=cast("Recompute | tuple[Recompute, ...]", read_recompute(arguments.recompute or "none")),
        )
    return plan_memory(
        net,
        arguments.batch_size,
        partial(_optimizer, config.on_text),
        params=parameter_groups(config, net),
        clip_norm=1.0 if config.on_text else None,
        autocast=AMP[config.amp],
        recompute=None if budgeted and arguments.recompute is None else read_recompute(arguments.recompute or "none"),
        memory_budget=arguments.memory_budget,
        overlap="auto" if arguments.overlap == "auto" else arguments.overlap == "on",
    )


def _optimizer(on_text: bool, params: list[Any]) -> torch.optim.Optimizer:
    if on_text:
        return torch.optim.AdamW(params, lr=1e-3, betas=BETAS, weight_decay=0.1)
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)

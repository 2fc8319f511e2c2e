"""Options that say what network is cut by what rule."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from ..models import NAMES
from ..rules import AugLocal, ContSup


def add_network_options(group: Any, rules: Sequence[str]) -> None:
    """Adds them to a group of arguments; each has the default None, which tells that it was not given.

    Args:
        rules: what ``--rule`` may be.
    """
    add = group.add_argument
    add("--network", choices=NAMES, metavar="NAME", help=f"{', '.join(NAMES)} (default resnet32)")
    add("--width", type=int, metavar="N", help="width of a CIFAR ResNet's first stage (default 16)")
    add(
        "--rule",
        choices=rules,
        help="default auglocal" + ("; bp: backpropagation of the same network" if "bp" in rules else ""),
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


def _modules(text: str) -> int | tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, or numbers joined by commas, got {text!r}") from error
    return numbers if "," in text else numbers[0]

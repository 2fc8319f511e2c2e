"""``python -m auglocal_ext cuts``: where a network can be cut into local modules, and why not elsewhere."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any, get_args

from torch import nn

from ..layers import probe_input
from ..models import check_name, default_input_shape, is_segmentation, network_by_name
from ..models.named import LIBRARIES
from ..segments import Boundary, Passage, Skips, find_boundaries
from .show import show
from .spelling import as_options, too_large, whole

_EPILOG = """
FLOPs are those of convolutions and matrix products, for one sample, forward, since the cut before. The network runs on
fake tensors; no image is needed. localize(model, rule, modules=[NAME, ...]) cuts after the submodules named; where
something crosses beside the output, with skips="detach".
"""


def add_parser(subparsers: Any) -> None:
    """Adds ``cuts``."""
    parser = subparsers.add_parser(
        "cuts",
        usage="python -m auglocal_ext cuts --network NAME [options]",
        help="list where a network can be cut into local modules",
        description="List the submodules after which exactly one tensor is needed later, so that a network can be cut "
        "there.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add(
        "--network",
        required=True,
        metavar="NAME",
        help="as for train, or MODULE:FUNCTION: a function without arguments that makes the network",
    )
    add("--input-shape", type=whole, nargs="+", metavar="N", help="of one sample (default: what it was designed for)")
    add("--output", metavar="NAME", help="what is learned from, of a network that returns more than one tensor")
    add(
        "--skips",
        choices=get_args(Skips),
        default="refuse",
        help="detach: also list where skip connections are cut, with what crosses beside the output, and its bytes",
    )
    add("--all", action="store_true", help="also list where it cannot be cut, with what crosses there")


def run(arguments: argparse.Namespace) -> int:
    """Prints the table; 1 with a message for a network that cannot be made or run."""
    try:
        show(_table(arguments))
        return 0
    except (TypeError, ValueError) as error:
        said = as_options(str(error), vars(arguments))
    except RuntimeError as error:
        said = too_large(error)
    print(f"error: {said}", file=sys.stderr)
    return 1


def _table(arguments: argparse.Namespace) -> str:
    name = arguments.network
    if arguments.input_shape is not None and min(arguments.input_shape) < 1:
        raise ValueError(f"--input-shape is sizes of at least 1; got {' '.join(map(str, arguments.input_shape))}")
    network, shape = _made(name, arguments.input_shape)
    output = "out" if arguments.output is None and is_segmentation(name) else arguments.output
    passage = find_boundaries(network, probe_input(network, shape), output, arguments.skips)
    lines = as_text(passage, refused=arguments.all)
    where = f"{len(passage.boundaries)} of {len(passage.boundaries) + len(passage.refused)} places"
    return f"{name} on {' x '.join(map(str, shape))}: it can be cut at {where}\n{lines}"


def _made(name: str, shape: list[int] | None) -> tuple[nn.Module, tuple[int, ...]]:
    path, _, function = name.partition(":")
    if name == "gpt":
        raise ValueError(
            f"{name} is a language model, made of layers with a cut after any of them: --modules of train and plan "
            "chooses the cuts, and this command is for networks whose own forward pass has to be searched"
        )
    if not function or path in LIBRARIES:
        check_name(name)
        size = shape[-1] if shape is not None and len(shape) == 3 else None
        return network_by_name(name, image_size=size), tuple(shape or default_input_shape(name))
    if shape is None:
        raise ValueError(f"--input-shape is missing: the shape of one input of {name}, such as 3 32 32")
    try:
        made = getattr(importlib.import_module(path), function)()
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--network {name}: {error}") from error
    if not isinstance(made, nn.Module):
        raise TypeError(f"{name} returns {type(made).__name__}, which is no module")
    return made, tuple(shape)


def as_text(passage: Passage, refused: bool = False) -> str:
    """The boundaries as a table; with ``refused`` also where the model cannot be cut."""
    crossed = any(each.crossing for each in passage.boundaries)
    rows = [("after", "shape", "bytes per sample", "FLOPs", "crossing beside it, bytes per sample")[: 4 + crossed]]
    rows += [
        (str(each), _shape(each), f"{each.bytes:,}", _flops(each.flops), _crossing(each))[: 4 + crossed]
        for each in passage.boundaries
    ]
    rows.append(("(the output)", "", "", _flops(passage.tail_flops), "")[: 4 + crossed])
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    if refused:
        lines += ["", "not after"]
        lines += [f"{each}: {each.refused}" for each in passage.refused]
    return "\n".join(lines)


def _aligned(row: tuple[str, ...], widths: list[int]) -> list[str]:
    after, shape, size, flops = (
        cell.ljust(width) if column < 2 else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(row, widths, strict=False))
    )
    return [after, shape, size, flops, *row[4:]]


def _crossing(boundary: Boundary) -> str:
    shown = ", ".join(f"{each} {each.bytes:,}" for each in boundary.crossing[:3])
    total = sum(each.bytes for each in boundary.crossing)
    more = len(boundary.crossing) - 3
    return f"{shown} and {more} more, {total:,} in all" if more > 0 else shown


def _shape(boundary: Boundary) -> str:
    return " x ".join(map(str, boundary.shape or ()))


def _flops(count: int) -> str:
    return f"{count / 1e6:,.1f} M"

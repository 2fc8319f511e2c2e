"""``python -m auglocal_ext analyze``: what the layers of trained networks represent, as tables and pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ..analysis.report import IMAGES, INFORMATION_EPOCHS, PROBE_BLOCKS, PROBE_EPOCHS, Report
from ..analysis.selection import ANALYSES, Settings, select
from ..training import TrainingError
from .spelling import seed, whole
from .train import INTERRUPTED

_EPILOG = """
cka: similarity of layers (minibatch unbiased linear CKA). probes: accuracy of a linear classifier on each frozen layer.
information: I(h, x) by reconstructing the image, I(h, y) by a strong classifier. curves: loss and accuracy of each
local module over the epochs, and on the test images. Each run's results are written as soon as they are there:
Ctrl-C loses those of the run in progress alone. How each figure is made stands in DIR/analysis.json.
"""


def add_parser(subparsers: Any) -> None:
    """Adds ``analyze``."""
    parser = subparsers.add_parser(
        "analyze",
        usage="python -m auglocal_ext analyze --checkpoint RUN [RUN ...] [options]",
        help="compare what trained networks' layers represent",
        description="Similarity of layers (CKA), linear probes, mutual information and learning curves of runs that "
        "`train` has made, as CSV files and PNG figures.",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--checkpoint", nargs="+", required=True, metavar="RUN", help="run folders, or the checkpoints in them")
    add(
        "--against",
        metavar="RUN",
        help="the run whose layers CKA compares with, usually backpropagation's (default: each run with itself)",
    )
    add("--analyses", nargs="+", choices=ANALYSES, metavar="NAME", help=f"of {', '.join(ANALYSES)} (default all)")
    add("--output", default="runs/analysis", metavar="DIR", help="folder of the results (default runs/analysis)")

    add = parser.add_argument_group("data").add_argument
    add("--data", metavar="DIR", help="where the images lie now (default: where they lay when the runs were trained)")
    add("--images", type=whole, metavar="N", help=f"test images for CKA (default {IMAGES}, or all there are)")
    add("--train-images", type=whole, metavar="N", help="fewer training images for probes and information")
    add("--batch-size", type=whole, default=256, metavar="N", help="default 256")

    add = parser.add_argument_group("training of probes and decoders").add_argument
    add("--probe-epochs", type=whole, metavar="N", help=f"of the linear probes (default {PROBE_EPOCHS})")
    add(
        "--information-epochs",
        type=whole,
        metavar="N",
        help=f"of decoders and strong classifiers (default {INFORMATION_EPOCHS})",
    )
    add(
        "--probe-blocks",
        type=whole,
        metavar="N",
        help=f"residual blocks per stage of the strong classifiers (default {PROBE_BLOCKS}: the size of ResNet-32)",
    )
    add("--seed", type=seed, default=0, metavar="N", help="of everything that is drawn, 0 to 2^64 - 1 (default 0)")
    add("--device", default="auto", metavar="NAME", help="auto (default), cpu, cuda, cuda:1, ...")


def run(arguments: argparse.Namespace) -> int:
    """Writes tables and figures; 130 after Ctrl-C, 1 with a message for runs, data or settings that do not fit."""
    options = {name: value for name, value in vars(arguments).items() if name != "command" and value is not None}
    for name in ("checkpoint", "analyses"):
        if name in options:
            options[name] = tuple(options[name])
    try:
        report = Report(select(Settings(**options)))
        report.write()
    except KeyboardInterrupt:
        print(f"\nstopped; what was finished is in {Path(arguments.output)}", file=sys.stderr)
        return INTERRUPTED
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"\nsee {report.output}")
    return 0

"""Whole training steps of fused networks on a CPU, beside the same networks with eager layers.

    python benchmarks/fused_step.py

Each line is AugLocal (d = 2, one optimizer step per module) or backpropagation, on a network, a memory layout and a
dtype; bf16 is autocast, where the processor multiplies it. Fused and eager steps take turns. Prints times and the ratio
of peak memory, and writes a JSON file.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from _environment import environment
from _resume import write_json
from _timing import Spread, in_turn, peak_bytes
from torch import nn

from auglocal_ext import AugLocal, LocalSequential, fuse, models
from auglocal_ext.step import LocalStep

METHOD = (
    "Forward and backward passes and SGD with momentum, on random images of 32 x 32. Fused and eager steps in turns; "
    "the ratio is that of the medians. Peaks are counted operator by operator, weights and images left out."
)
NETWORKS = {
    "ResNet-32": partial(models.resnet_cifar, 32),
    "ResNet-20, half width": partial(models.resnet_cifar, 20, width=8),
}
RULES = ("BP", "AugLocal d=2")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
DTYPES = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Line:
    network: str
    rule: str
    layout: str
    dtype: str
    fused: Spread
    eager: Spread
    ratio: float
    fused_peak: int
    eager_peak: int


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="images of a step")
    parser.add_argument("--seconds", type=float, default=6.0, help="time spent on each side of a line")
    parser.add_argument("--quick", action="store_true", help="ten turns a line")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the JSON file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    dtypes = [name for name in DTYPES if name == "fp32" or multiplies_bfloat16()]
    if "bf16" not in dtypes:
        print("no bf16: this processor does not multiply it")
    print(f"{'network':24} {'rule':14} {'layout':14} {'dtype':6} {'fused, ms':>10} {'eager, ms':>10} {'ratio':>6} peak")
    lines = []
    for line in measured(dtypes, options.batch, 0.0 if options.quick else options.seconds):
        lines.append(line)
        times = f"{line.fused.median * 1e3:10.1f} {line.eager.median * 1e3:10.1f} {line.ratio:6.2f}"
        names = f"{line.network:24} {line.rule:14} {line.layout:14} {line.dtype:6}"
        print(f"{names} {times} {line.fused_peak / line.eager_peak:4.2f}", flush=True)
    path = options.output / "fused-step-cpu.json"
    settings = {"batch": options.batch, "seconds_per_side": options.seconds, "quick": options.quick}
    head = {"environment": environment(), "device": "cpu", "method": METHOD, "settings": settings}
    write_json(path, {**head, "results": [asdict(line) for line in lines]})
    print(f"\nwrote {path}")
    return 0


def multiplies_bfloat16() -> bool:
    """Whether the processor has an instruction for it; without one autocast converts back and forth."""
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("arm_bf16"))


def measured(dtypes: Sequence[str], batch: int, seconds: float) -> Iterator[Line]:
    for network, rule, layout, dtype in product(NETWORKS, RULES, LAYOUTS, dtypes):
        torch.manual_seed(0)
        eager = NETWORKS[network]().to(memory_format=LAYOUTS[layout])
        images = torch.randn(batch, 3, 32, 32).to(memory_format=LAYOUTS[layout])
        labels = torch.randint(10, (batch,))
        steps = {
            side: step(rule, deepcopy(eager), side == "fused", images, labels, DTYPES[dtype])
            for side in ("fused", "eager")
        }
        times = in_turn(steps, seconds, lambda: None)
        peaks = [peak_bytes(steps[side], "cpu") for side in ("fused", "eager")]
        ratio = times["fused"].median / times["eager"].median
        yield Line(network, rule, layout, dtype, times["fused"], times["eager"], ratio, *peaks)


def step(
    rule: str,
    net: nn.Sequential,
    fused: bool,
    images: torch.Tensor,
    labels: torch.Tensor,
    half: torch.dtype | None,
) -> Callable[[], object]:
    """A training step of ``net``, which it changes."""
    if rule != "BP":
        local = LocalSequential(net, AugLocal(depth=2), num_classes=10, input_shape=(3, 32, 32), fused=fused)
        own = LocalStep(local, sgd, autocast=half)
        return partial(own, images, labels)
    if fused:
        fuse(net)
    optimizer = sgd(net.parameters())

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with nullcontext() if half is None else torch.autocast("cpu", dtype=half):
            loss = F.cross_entropy(net(images), labels)
        loss.backward()
        optimizer.step()

    return run


def sgd(parameters: Any) -> torch.optim.SGD:
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)


if __name__ == "__main__":
    sys.exit(main())

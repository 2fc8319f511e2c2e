"""What a fused op costs the host, beside the eager layers that it takes the place of: forward and backward together.

    python benchmarks/host.py                  # the GPU where there is one, else the CPU
    python benchmarks/host.py --device cpu --provider aten

Tensors have a few elements, so that kernels take next to nothing: what is left is Python, dispatch and autograd, on one
thread. Fused and eager calls take turns. A row whose gradients differ from eager's is an error, not a time. Prints a
table and writes a JSON file.

Exit status: 0 when every row has a time, else 1.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _environment import environment
from _host_cases import Pair, Side, pairs
from _resume import write_json
from _timing import Spread, in_turn
from torch import Tensor

from auglocal_ext import native
from auglocal_ext.ops import providers, tuning

METHOD = (
    "Forward pass and torch.autograd.grad in fp32, on one thread; fused and eager in turns. "
    "The clock stops when the call returns; on CUDA the device is waited for before each call, outside its time. "
    "Providers are those of the fixed order, or the one asked for. The ratio is that of the medians."
)
MOST = 5000  # turns of a row
TOLERANCE = 1e-4  # of a gradient's largest element


@dataclass(frozen=True)
class Row:
    """``fused`` and ``eager`` are seconds; None where ``error`` says why there are none."""

    name: str
    replaces: str
    fused: Spread | None = None
    eager: Spread | None = None
    ratio: float | None = None
    error: str = ""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--provider", choices=("auto", *providers.NAMES), default="auto", help="as AUGLOCAL_PROVIDER")
    parser.add_argument("--seconds", type=float, default=1.5, help="the most that a side of a row gets")
    parser.add_argument("--quick", action="store_true", help="ten turns a row")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the JSON file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    os.environ |= {providers.ENVIRONMENT: options.provider, tuning.ENVIRONMENT: "0"}
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # its rounding would be seen in the gradients of convolutions
    try:
        chosen = {op: providers.choose(op, options.device, torch.float32) for op in providers.TABLES}
    except RuntimeError as error:
        parser.error(str(error))
    if options.provider not in ("auto", *chosen.values()):
        parser.error(f"--provider {options.provider} serves no op on {options.device}")
    nodes = native.nodes()
    settings = {
        "seconds_per_side": options.seconds,
        "quick": options.quick,
        "providers": chosen,
        "nodes": f"in Python: {nodes}" if isinstance(nodes, str) else "compiled",
    }
    print(f"{options.device}, provider {options.provider}, autograd nodes {settings['nodes']}")
    print(f"{'fused':28} {'in place of':50} {'fused, us':>10} {'eager, us':>10} {'ratio':>6}")
    rows = []
    for pair in pairs(options.device):
        rows.append(measure(pair, options.device, 0.0 if options.quick else options.seconds))
        print(_line(rows[-1]), flush=True)
    path = options.output / f"host-{options.device}.json"
    head = {"environment": environment(), "device": options.device, "method": METHOD, "settings": settings}
    write_json(path, {**head, "results": [asdict(row) for row in rows]})
    print(f"\nwrote {path}")
    return 1 if any(row.error for row in rows) else 0


def measure(pair: Pair, device: str, seconds: float) -> Row:
    """Both sides in turns, once their gradients are found to be the same."""
    fused, eager = (_run(side, pair.grads) for side in (pair.fused, pair.eager))
    try:
        error = _difference(fused(), eager())
    except Exception as raised:  # one row that fails, as for want of a provider, leaves the others
        error = f"{type(raised).__name__}: {raised}".splitlines()[0]
    if error:
        return Row(pair.name, pair.replaces, error=error)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = in_turn({"fused": fused, "eager": eager}, seconds, wait, MOST)
    ratio = times["fused"].median / times["eager"].median
    return Row(pair.name, pair.replaces, times["fused"], times["eager"], ratio)


def _run(side: Side, grads: tuple[Tensor, ...] | None) -> Callable[[], tuple[Tensor, ...]]:
    forward, leaves = side
    return lambda: torch.autograd.grad(forward(), leaves, grads)


def _difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> str:
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = float((a - b).abs().max() / b.abs().max())
        if not error <= TOLERANCE:
            return f"gradient {index} differs from eager's by {error:.2g} of its largest element"
    return ""


def _line(row: Row) -> str:
    name = f"{row.name:28} {row.replaces:50}"
    if row.fused is None or row.eager is None:
        return f"{name} {row.error}"
    return f"{name} {row.fused.median * 1e6:10.1f} {row.eager.median * 1e6:10.1f} {row.ratio:6.2f}"


if __name__ == "__main__":
    sys.exit(main())

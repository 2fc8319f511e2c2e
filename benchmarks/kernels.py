"""Time and memory of the fused ops beside eager PyTorch and torch.compile, forward and backward together.

    python benchmarks/kernels.py                      # the GPU where there is one, else the CPU with small shapes
    python benchmarks/kernels.py --device cpu --dtype fp32 bf16 --seconds 0.5

GB/s divides the bytes any implementation has to move (inputs read once, results written once) by the median time;
"of copy" is its share of the bandwidth of a plain copy, measured in the same run. A line whose results differ from
eager float32 is an error, not a time. Prints a table and writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _environment import environment
from _kernel_cases import Case, cases
from _timing import Spread, copy_bandwidth, measure, peak_bytes
from torch import Tensor

from auglocal_ext.ops import providers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Result:
    """One line of the table; ``error`` where there is no time, ``peak`` None where it cannot be counted."""

    op: str
    shape: str
    dtype: str
    variant: str
    time: Spread | None
    bytes: int
    peak: int | None
    error: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each line")
    parser.add_argument("--variant", nargs="+", help="lines to measure (eager, compile, a provider); default: all")
    parser.add_argument("--quick", action="store_true", help="the first shape of each op, ten runs a line")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the JSON file")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seconds = 0.0

    bandwidth = copy_bandwidth(options.device, options.seconds)
    print(
        f"{options.device}: plain copy {bandwidth / 1e9:.1f} GB/s"
        + ("" if options.device == "cuda" else ", small shapes")
    )
    results: list[Result] = []
    for name in options.dtype:
        for case in cases(options.device, DTYPES[name], options.quick):
            print(f"\n{case.op}, {case.shape}, {name}: {case.bytes / 1e6:.2f} MB to move")
            expected = _float32(case)
            for variant, function in variants(case, options.device).items():
                if options.variant is None or variant in options.variant:
                    result = _measure(case, name, variant, function, expected, options)
                    results.append(result)
                    print(_line(result, bandwidth))
    options.output.mkdir(parents=True, exist_ok=True)
    output = options.output / f"kernels-{options.device}.json"
    record = {"environment": environment(), "device": options.device, "copy_bytes_per_second": bandwidth}
    output.write_text(json.dumps({**record, "results": [asdict(r) for r in results]}, indent=1) + "\n")
    print(f"\nwrote {output}")
    return 1 if any(r.error for r in results) else 0


def variants(case: Case, device: str) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """The lines of a case: the composition eager and compiled, then every provider that runs here."""
    # Without a reset the second shape of a function would be compiled for all shapes, which a network has no use for.
    torch.compiler.reset()
    found = {"eager": case.composition, "compile": torch.compile(case.composition, dynamic=False)}
    for provider in providers.TABLES[case.op].providers:
        if provider.name == "triton" and providers.interpreted():
            continue  # the interpreter's time says nothing
        if provider.serves(device) and case.dtype in provider.dtypes and providers.available(provider.name):
            found[provider.name] = partial(case.fused, provider=provider.name)
    return found


def forward_backward(
    function: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Any], grad: Tensor | None
) -> tuple[Tensor, ...]:
    """The first result (a loss, or a map with its upstream gradient) and the gradients of the inputs that want one."""
    result = function(*inputs)[0]
    wanted = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    return result.detach(), *torch.autograd.grad(result, wanted, grad)


def _float32(case: Case) -> tuple[Tensor, ...]:
    inputs = [
        t.detach().float().requires_grad_() if isinstance(t, Tensor) and t.requires_grad else t for t in case.inputs
    ]
    return forward_backward(case.composition, inputs, None if case.grad is None else case.grad.float())


def _measure(
    case: Case,
    dtype: str,
    variant: str,
    function: Callable[..., tuple[Tensor, ...]],
    expected: tuple[Tensor, ...],
    options: argparse.Namespace,
) -> Result:
    result = Result(case.op, case.shape, dtype, variant, None, case.bytes, None)

    def run() -> tuple[Tensor, ...]:
        return forward_backward(function, case.inputs, case.grad)

    try:
        wrong = _difference(run(), expected, TOLERANCE[case.dtype])
        if wrong:
            return replace(result, error=wrong)
        spread = measure(run, options.device, options.seconds)
        # On the CPU bytes are counted by a mode under which compiled code would run eagerly.
        counted = options.device == "cuda" or variant != "compile"
        return replace(result, time=spread, peak=peak_bytes(run, options.device) if counted else None)
    except Exception as error:  # one line that fails, as a compiler missing for torch.compile, leaves the others
        return replace(result, error=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def _difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> str:
    for index, (a, b) in enumerate(zip(found, expected, strict=True)):
        error = (a.float() - b).abs() / b.abs().max()
        # In 16 bits rounding puts a value next to zero on the other side of the mask here and there.
        wrong = float((~(error <= tolerance)).float().mean())
        if wrong > 0.01:
            return (
                f"result {index} differs from eager float32 by up to {float(error.max()):.2g} of its largest element, "
                f"in {wrong:.0%} of all by more than {tolerance:.2g}"
            )
    return ""


def _line(result: Result, bandwidth: float) -> str:
    if result.time is None:
        return f"  {result.variant:10} {result.error}"
    time, rate = result.time, result.bytes / result.time.median
    peak = "peak not counted" if result.peak is None else f"peak {result.peak / 1e6:9.2f} MB"
    return (
        f"  {result.variant:10} {time.median * 1e6:9.1f} us ({time.low * 1e6:.1f} to {time.high * 1e6:.1f})  "
        f"{rate / 1e9:7.1f} GB/s  {rate / bandwidth:6.1%} of copy  {peak}"
    )


if __name__ == "__main__":
    sys.exit(main())

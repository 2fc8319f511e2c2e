"""Time and memory of the fused ops beside eager PyTorch and torch.compile, forward and backward together.

    python benchmarks/kernels.py                      # the GPU where there is one, else the CPU with small shapes
    python benchmarks/kernels.py --device cpu --dtype fp32 bf16 --seconds 0.5
    python benchmarks/kernels.py --op batch_norm_act --limit 500 --resume

On CUDA no time contains Python: replays of a CUDA graph are timed, or, where one cannot be captured, runs that were
launched while the device slept; each line says which. On the CPU the variants of a case take turns, run by run. GB/s
divides the bytes any implementation has to move (inputs read once, results written once) by the median time; "of copy"
is its share of the bandwidth of a plain copy, measured in the same run. A line whose results differ from eager float32
is an error, not a time. Prints a table and writes a JSON file, line by line.

Exit status: 0 when all lines are there, 1 if one is an error, 130 if --limit came before the end.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _device_timing import BrokenCaptureError
from _environment import environment
from _kernel_cases import OPS, Case, cases
from _resume import INTERRUPTED, NEVER_ENDED, StartOverError, earlier, is_broken, start_over, write_json
from _timing import Spread, copy_bandwidth, in_turn, measure, peak_bytes
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


Key = tuple[str, str, str, str]


class Report:
    """The lines by op, shape, dtype and variant, in one file; ``uncaptured`` are those whose capture CUDA broke off."""

    def __init__(self, path: Path, head: dict[str, Any], resume: bool):
        self.path, self._head = path, head
        record = earlier(path, head) if resume else None
        self.lines: dict[Key, dict[str, Any]] = {}
        self.uncaptured: dict[str, str] = {}
        self._begun: Result | None = None
        if record is not None:
            self.lines = {key_of(line): line for line in record["results"]}
            self.uncaptured = record["uncaptured"]
            if record["begun"] is not None:
                self.lines[key_of(record["begun"])] = {**record["begun"], "error": NEVER_ENDED}
            # The bandwidth of this sitting would move the shares of the lines before it.
            head["copy_bytes_per_second"] = record["copy_bytes_per_second"]

    @property
    def bandwidth(self) -> float:
        return self._head["copy_bytes_per_second"]

    def begin(self, result: Result) -> None:
        """Note down what is measured next, should this process not live to see its end."""
        self._begun = result
        self.write()

    def add(self, result: Result) -> None:
        line = asdict(result)
        self.lines[key_of(line)] = line
        self.leave()

    def leave(self) -> None:
        """End without a result what was begun."""
        self._begun = None
        self.write()

    def write(self) -> None:
        begun = None if self._begun is None else asdict(self._begun)
        found = {"uncaptured": self.uncaptured, "begun": begun, "results": list(self.lines.values())}
        write_json(self.path, {**self._head, **found})


def key_of(line: dict[str, Any]) -> Key:
    return line["op"], line["shape"], line["dtype"], line["variant"]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=tuple(DTYPES), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--op", choices=OPS, nargs="+", default=list(OPS), metavar="OP", help=f"of {', '.join(OPS)}")
    parser.add_argument("--seconds", type=float, default=0.3, help="time spent on each line")
    parser.add_argument("--variant", nargs="+", help="lines to measure (eager, compile, a provider); default: all")
    parser.add_argument("--quick", action="store_true", help="the first shape of each op, ten runs a line")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no case is begun")
    parser.add_argument("--resume", action="store_true", help="leave out the lines that the JSON file has already")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder for the JSON file")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    deadline = time.monotonic()
    options = make_parser().parse_args(arguments)
    deadline += options.limit
    if options.quick:
        options.seconds = 0.0
    settings = {"seconds_per_line": options.seconds, "quick": options.quick}
    head: dict[str, Any] = {"environment": environment(), "device": options.device, "settings": settings}
    report = Report(options.output / f"kernels-{options.device}.json", head, options.resume)
    if "copy_bytes_per_second" not in head:
        head["copy_bytes_per_second"] = copy_bandwidth(options.device, options.seconds)
    report.write()
    size = "" if options.device == "cuda" else ", small shapes"
    print(f"{options.device}: plain copy {report.bandwidth / 1e9:.1f} GB/s{size}")
    try:
        finished = measure_all(options, report, deadline)
    except StartOverError as error:
        print(f"  {error}: the rest in a new process")
        start_over(__file__, sys.argv[1:] if arguments is None else arguments, deadline)
    print(f"\nwrote {report.path}" + ("" if finished else "; --limit came before the end: --resume goes on"))
    failed = [line for line in report.lines.values() if line["error"]]
    if failed:
        print(f"{len(failed)} of {len(report.lines)} lines are errors, such as {', '.join(key_of(failed[0]))}")
    return INTERRUPTED if not finished else 1 if failed else 0


def measure_all(options: argparse.Namespace, report: Report, deadline: float) -> bool:
    """All lines that are not there yet, case by case; whether the time was enough."""
    for name in options.dtype:
        for case in cases(options.device, DTYPES[name], options.op, options.quick):
            missing = {
                variant: function
                for variant, function in variants(case, options.device, options.variant).items()
                if (case.op, case.shape, name, variant) not in report.lines
            }
            if not missing:
                continue
            if time.monotonic() > deadline:
                return False
            print(f"\n{case.op}, {case.shape}, {name}: {case.bytes / 1e6:.2f} MB to move", flush=True)
            if options.device == "cpu":
                measure_in_turn(case, name, missing, options, report)
                continue
            for variant, function in missing.items():
                measure_line(case, name, variant, function, options, report)
    return True


def measure_in_turn(
    case: Case,
    dtype: str,
    missing: dict[str, Callable[..., tuple[Tensor, ...]]],
    options: argparse.Namespace,
    report: Report,
) -> None:
    """The lines of a case on the CPU into the report; its variants run in turn."""
    results, runs = {}, {}
    for variant, function in missing.items():
        result = Result(case.op, case.shape, dtype, variant, None, case.bytes, None)
        report.begin(result)
        run = partial(forward_backward, function, case.inputs, case.grad)
        results[variant] = replace(result, error=_failure(run, case))
        if not results[variant].error:
            runs[variant] = run
    report.leave()
    for variant, spread in in_turn(runs, options.seconds).items():
        # Bytes are counted by a mode under which compiled code would run eagerly.
        peak = None if variant == "compile" else peak_bytes(runs[variant], "cpu")
        results[variant] = replace(results[variant], time=spread, peak=peak)
    for result in results.values():
        report.add(result)
        print(_line(result, report.bandwidth), flush=True)


def measure_line(
    case: Case,
    dtype: str,
    variant: str,
    function: Callable[..., tuple[Tensor, ...]],
    options: argparse.Namespace,
    report: Report,
) -> None:
    """One line into the report; StartOverError if this process can measure no more."""
    result = Result(case.op, case.shape, dtype, variant, None, case.bytes, None)
    name = ", ".join((case.op, case.shape, dtype, variant))
    report.begin(result)
    try:
        result = _measure(result, case, function, options, name not in report.uncaptured)
    except BrokenCaptureError as error:
        report.uncaptured[name] = str(error)
        report.leave()
        raise StartOverError(f"the capture of {name} failed ({error})") from error
    except KeyboardInterrupt:
        report.leave()
        raise
    report.add(result)
    print(_line(result, report.bandwidth), flush=True)
    if result.error and is_broken():
        raise StartOverError(f"CUDA answers no more after {name}")


def variants(
    case: Case, device: str, wanted: Sequence[str] | None = None
) -> dict[str, Callable[..., tuple[Tensor, ...]]]:
    """The lines of a case: the composition eager and compiled, then every provider that runs here."""
    found = {"eager": case.composition}
    if wanted is None or "compile" in wanted:
        # Without a reset the second shape of a function would be compiled for all shapes, which a network has no use
        # for.
        torch.compiler.reset()
        found["compile"] = torch.compile(case.composition, dynamic=False)
    for provider in providers.TABLES[case.op].providers:
        if provider.name == "triton" and providers.interpreted():
            continue  # the interpreter's time says nothing
        if provider.serves(device) and case.dtype in provider.dtypes and providers.available(provider.name, device):
            found[provider.name] = partial(case.fused, provider=provider.name)
    return {name: function for name, function in found.items() if wanted is None or name in wanted}


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
    result: Result,
    case: Case,
    function: Callable[..., tuple[Tensor, ...]],
    options: argparse.Namespace,
    graph: bool,
) -> Result:
    run = partial(forward_backward, function, case.inputs, case.grad)
    wrong = _failure(run, case)
    if wrong:
        return replace(result, error=wrong)
    try:
        spread = measure(run, options.device, options.seconds, graph=graph)
        return replace(result, time=spread, peak=peak_bytes(run, options.device))
    except BrokenCaptureError:
        raise
    except Exception as error:
        return replace(result, error=_told(error))


def _failure(run: Callable[[], tuple[Tensor, ...]], case: Case) -> str:
    """Why a line has no time; empty where its results are right."""
    try:
        return _difference(run(), _float32(case), TOLERANCE[case.dtype])
    except BrokenCaptureError:
        raise
    except Exception as error:  # one line that fails, as a compiler missing for torch.compile, leaves the others
        return _told(error)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


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
    spread, rate = result.time, result.bytes / result.time.median
    peak = "peak not counted" if result.peak is None else f"peak {result.peak / 1e6:9.2f} MB"
    return (
        f"  {result.variant:10} {spread.median * 1e6:9.1f} us ({spread.low * 1e6:.1f} to {spread.high * 1e6:.1f})  "
        f"{rate / 1e9:7.1f} GB/s  {rate / bandwidth:6.1%} of copy  {peak}  {spread.way}".rstrip()
    )


if __name__ == "__main__":
    sys.exit(main())

"""What the machine code of the hot CUDA kernels says before they run, and what that lets one forecast.

``python benchmarks/static_kernels.py`` compiles ``csrc/cuda`` for three GPUs, none of which need be there, and writes
``results/kernels-static.json`` and ``.md``. Registers, shared memory, instructions and bytes are read from the code;
the shares of copy bandwidth are forecasts, bounds from above, and no measurements.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import _cubins
from _cubins import Kernel
from _environment import environment

RESULTS = Path(__file__).resolve().parent / "results"
THREADS = 256  # of a block, in every kernel
SIZES = {"float": 4, "BFloat16": 2}


@dataclass(frozen=True)
class Gpu:
    """What limits a kernel on one GPU, by its data sheet."""

    architecture: str
    multiprocessors: int
    registers: int  # of a multiprocessor, as all that follows
    shared: int  # bytes
    reserved: int  # bytes of it that every block costs; for sm_90 the tools count them with the kernel's
    threads: int
    clock: float  # boost, Hz
    copy: float  # bytes read and written per second, assumed: 0.9 of the data sheet's bandwidth

    def blocks(self, kernel: Kernel) -> int:
        """Blocks that a multiprocessor holds at a time; registers are given out by 8 a thread."""
        registers = -(-kernel.registers // 8) * 8 * THREADS
        shared = kernel.shared + self.reserved
        limits = [self.threads // THREADS, self.registers // registers]
        return min(limits + ([self.shared // shared] if kernel.shared else []))


GPUS = {
    "H200": Gpu("sm_90", 132, 65536, 228 << 10, 0, 2048, 1.98e9, 0.9 * 4.8e12),
    "A100": Gpu("sm_80", 108, 65536, 164 << 10, 1 << 10, 2048, 1.41e9, 0.9 * 2.039e12),
    "4090": Gpu("sm_89", 128, 65536, 100 << 10, 1 << 10, 1536, 2.52e9, 0.9 * 1.008e12),
}
LATENCY = 0.75e-6  # seconds for which a byte is in flight, assumed: 24 KB a multiprocessor on an H200
LANES = 128  # instructions that a multiprocessor begins in a cycle, counted by threads


@dataclass(frozen=True)
class Row:
    """A kernel and what it moves. ``{V}`` in the arguments is the number of elements in 16 bytes."""

    op: str
    what: str
    kernel: str
    arguments: str
    read: float  # elements, for each element of the larger map
    written: float
    others: float = 0  # bytes of other types, likewise
    vectors: int | None = None  # of the map in one round of the main loop; None: by the loads in it
    rounds: int = 0  # of the main loop for one vector, where it has a fixed number of them
    share: float = 1  # elements of the larger map for one of those that the loop counts
    scalar: bool = False  # one element a round, in the first loop, and all that it moves in flight

    def find(self, kernels: list[Kernel], dtype: str) -> Kernel:
        wanted = tuple(self.arguments.format(V=16 // SIZES[dtype]).split()) if self.arguments else ()
        return next(k for k in kernels if k.name == self.kernel and k.arguments == (dtype, *wanted))

    def instructions(self, kernel: Kernel, dtype: str) -> float:
        """For each element of the larger map, in the main loop; with a fixed number of rounds in the whole kernel."""
        loop, vector = kernel.main_loop, 16 // SIZES[dtype]
        if self.scalar:
            return len(kernel.loops[0]) / self.share
        if self.rounds:
            return (len(kernel.code) + (self.rounds - 1) * len(loop)) / vector / self.share
        vectors = self.vectors if self.vectors is not None else loop.wide("LDG") / self.read
        return len(loop) / (vectors * vector) / self.share

    def bytes(self, dtype: str) -> float:
        return (self.read + self.written) * SIZES[dtype] + self.others

    def in_flight(self, kernel: Kernel, dtype: str) -> float:
        """Bytes that a thread has asked for before it uses the first of them."""
        if self.scalar:
            return self.bytes(dtype) * self.share
        return 16 * (self.vectors * self.read if self.vectors is not None else kernel.main_loop.wide("LDG"))


NORM, POOL, SIMILARITY, LAYER = "batch_norm_act", "batch_norm_act_max_pool", "similarity_loss", "layer_norm"
ROWS = [
    Row(NORM, "statistics, channels-last", "stats_rows_kernel", "", 1, 0),
    Row(NORM, "apply ReLU, channels-last", "apply_rows_kernel", "1 0", 1, 1),
    Row(NORM, "apply residual and ReLU, channels-last", "apply_rows_kernel", "1 1", 2, 1),
    Row(NORM, "reduce, channels-last", "reduce_rows_kernel", "1 0", 2, 0),
    Row(NORM, "reduce with residual, channels-last", "reduce_rows_kernel", "1 1", 3, 0),
    Row(NORM, "input gradient, channels-last", "input_grad_rows_kernel", "1 0", 2, 1),
    Row(NORM, "input gradient with residual, channels-last", "input_grad_rows_kernel", "1 1", 3, 2),
    Row(NORM, "statistics, contiguous", "stats_kernel", "{V} 0", 1, 0, vectors=2),
    Row(NORM, "apply, contiguous", "apply_kernel", "{V} 0", 1, 1, vectors=1),
    Row(NORM, "reduce, contiguous", "reduce_kernel", "{V} 0", 2, 0, vectors=1),
    Row(NORM, "input gradient, contiguous", "input_grad_kernel", "{V} 0", 2, 1, vectors=1),
    Row(POOL, "apply stem, channels-last", "apply_kernel", "{V} 0", 1, 0.25, 0.25, rounds=3, share=4),
    Row(POOL, "reduce stem, channels-last", "reduce_kernel", "0", 1.25, 0, 0.25, share=4, scalar=True),
    Row(SIMILARITY, "statistics, channels-last", "statistics_kernel", "{V} 1", 1, 0, vectors=1),
    Row(SIMILARITY, "statistics, contiguous", "statistics_kernel", "{V} 0", 1, 0, vectors=1),
    Row(SIMILARITY, "input gradient, channels-last", "input_grad_kernel", "{V} 1", 1, 1, vectors=1),
    Row(SIMILARITY, "input gradient, contiguous", "input_grad_kernel", "{V} 0", 1, 1, vectors=1),
    Row(LAYER, "normalise", "rows_kernel", "float {V} 4 0", 1, 1, vectors=4, rounds=1, share=4),
    Row(LAYER, "residual and normalise", "rows_kernel", "float {V} 4 0", 2, 2, vectors=4, rounds=1, share=4),
    Row(LAYER, "gradients", "backward_kernel", "float {V} 4 1", 2, 1, vectors=4),
    Row("reconstruction_loss", "loss and gradient", "pixels_kernel", "float {V}", 1, 1, 4, vectors=1),
    Row("pooled_cross_entropy", "pooling, channels-last", "pool_channels_kernel", "{V}", 1, 0, vectors=1),
    Row("pooled_cross_entropy", "pooling, contiguous", "pool_positions_kernel", "{V}", 1, 0, vectors=1),
]


def forecast(gpu: Gpu, threads: int, in_flight: float, instructions: float, moved: float) -> tuple[float, str]:
    """Share of copy bandwidth on a large map, and what limits it; the numbers but the first are for one thread."""
    limits = {
        "copy": 1.0,
        "in flight": threads * in_flight / (gpu.copy * LATENCY / gpu.multiprocessors),
        "instructions": LANES * gpu.clock * gpu.multiprocessors / instructions * moved / gpu.copy,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def measure(folder: Path) -> list[dict]:
    """The rows of the table for both dtypes."""
    compiled: dict[tuple[str, str], list[Kernel]] = {}
    table = []
    for row in ROWS:
        for dtype in SIZES:
            entry = {"op": row.op, "what": row.what, "dtype": dtype, "bytes_per_element": row.bytes(dtype), "gpus": {}}
            for name, gpu in GPUS.items():
                key = (row.op, gpu.architecture)
                if key not in compiled:
                    compiled[key] = _cubins.kernels(_cubins.compile_cubin(*key, folder))
                kernel = row.find(compiled[key], dtype)
                blocks, instructions = gpu.blocks(kernel), row.instructions(kernel, dtype)
                in_flight = row.in_flight(kernel, dtype)
                share, limit = forecast(gpu, blocks * THREADS, in_flight, instructions, row.bytes(dtype))
                entry["kernel"] = str(kernel)
                entry["gpus"][name] = {
                    "registers": kernel.registers,
                    "stack": kernel.stack,
                    "shared": kernel.shared,
                    "blocks": blocks,
                    "instructions_per_element": instructions,
                    "bytes_in_flight": blocks * THREADS * in_flight,
                    "forecast_share_of_copy": share,
                    "limit": limit,
                }
            table.append(entry)
    return table


HEADING = f"""# Static figures of the hot CUDA kernels

Written by `python benchmarks/static_kernels.py` from machine code for {", ".join(GPUS)}, in this order where a cell has
three numbers. **Nothing here has run.** The last column is a forecast, and a bound from above, of the share of a copy's
bandwidth (assumed: 0.9 of the data sheet's) on a map that is large beside the caches: the least of what the bytes in
flight (assumed: {LATENCY * 1e6:g} us for a byte), {LANES} instructions a cycle and multiprocessor at boost clock, and
a copy allow. Launch, first loads, merges and the last wave of blocks cost on top of it. Instructions are those of the
main loop, or of the whole kernel where there is none; in `batch_norm_act` for contiguous maps and in `layer_norm`
without a residual they include branches that are not taken, so more than such a forecast is possible. KB are bytes in
flight on a multiprocessor.

| op | pass | dtype | registers | shared | blocks per SM | instructions per element | bytes per element | KB | \
forecast share of copy, at most |
|---|---|---|---|---|---|---|---|---|---|
"""


def markdown(table: list[dict]) -> str:
    """The table, one line for each kernel and dtype."""
    lines = []
    for entry in table:
        gpus = entry["gpus"].values()

        def cell(name: str, form: str, gpus=gpus, scale: float = 1) -> str:
            values = [format(gpu[name] * scale, form) for gpu in gpus]
            return values[0] if len(set(values)) == 1 else " / ".join(values)

        shares = [f"{gpu['forecast_share_of_copy']:.0%}" for gpu in gpus]
        limits = [gpu["limit"] for gpu in gpus]
        forecasts = ", ".join(
            share if limit == "copy" else f"{share} ({limit})" for share, limit in zip(shares, limits, strict=True)
        )
        cells = [entry["op"], entry["what"], entry["dtype"].lower()]
        cells += [cell(name, "d") for name in ("registers", "shared", "blocks")]
        cells += [cell("instructions_per_element", ".1f"), format(entry["bytes_per_element"], "g")]
        cells += [cell("bytes_in_flight", ".0f", scale=1 / 1024), forecasts]
        lines.append(f"| {' | '.join(cells)} |")
    return HEADING + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the two result files")
    output = parser.parse_args().output
    try:
        compiler = _cubins.run(_cubins.find_nvcc(), "--version").strip().splitlines()[-1]
        with tempfile.TemporaryDirectory() as folder:
            table = measure(Path(folder))
    except _cubins.NoTools as error:
        print(f"static_kernels: {error}", file=sys.stderr)
        return 1
    record = {
        "environment": environment(),
        "compiler": compiler,
        "gpus": {name: asdict(gpu) for name, gpu in GPUS.items()},
        "rows": table,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "kernels-static.json").write_text(json.dumps(record, indent=1) + "\n")
    (output / "kernels-static.md").write_text(markdown(table))
    print(markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())

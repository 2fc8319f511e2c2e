"""What the machine code of the CUDA kernels says without a GPU: widths of accesses, registers, spills, instructions.

nvcc makes code for each architecture, and the disassembler shows it. A store that the compiler has split, or a loop
that has outgrown its registers, is found here and not by a slow GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ARCHITECTURES = ("sm_80", "sm_89", "sm_90")
OPS = (
    "batch_norm_act",
    "batch_norm_act_max_pool",
    "layer_norm",
    "pooled_cross_entropy",
    "reconstruction_loss",
    "similarity_loss",
    "supervised_contrast",
)
# Kernels that write a map, in the variants with vectors, and how many of their stores move fewer bytes.
WRITES_A_MAP = {
    ("batch_norm_act", "apply_rows_kernel"): 0,
    ("batch_norm_act", "input_grad_rows_kernel"): 0,
    ("batch_norm_act", "apply_kernel"): 0,
    ("batch_norm_act", "input_grad_kernel"): 0,
    ("batch_norm_act_max_pool", "apply_kernel"): 1,  # the bytes of the maxima
    ("batch_norm_act_max_pool", "input_grad_kernel"): 0,
    ("reconstruction_loss", "pixels_kernel"): 1,  # the sum of a block
    ("similarity_loss", "input_grad_kernel"): 0,
}
# Maps read, and instructions per element at most: without a residual, with one, and what leaky ReLU adds.
MAIN_LOOPS = {
    "stats_rows_kernel": (1, 6, 6, 0),
    "apply_rows_kernel": (1, 8, 8, 2),
    "reduce_rows_kernel": (2, 14, 14, 0),
    "input_grad_rows_kernel": (2, 16, 16, 0),
}
# Activations, as in csrc/batch_norm_act.h, that each has an instance for, without and with a residual.
INSTANCES = {
    "stats_rows_kernel": {()},
    "apply_rows_kernel": {(activation, residual) for activation in "012" for residual in "01"},
    "reduce_rows_kernel": {("0", "0"), ("1", "0"), ("1", "1"), ("2", "0"), ("2", "1")},
    "input_grad_rows_kernel": {("0", "0"), ("1", "0"), ("1", "1"), ("2", "0"), ("2", "1")},
}


@pytest.fixture
def cubins(load_benchmark: Callable[[str], ModuleType]) -> ModuleType:
    module = load_benchmark("_cubins")
    try:
        module.find_tool("nvdisasm"), module.find_tool("cuobjdump")
        known = module.known_architectures()
    except module.NoTools as error:
        pytest.skip(str(error))
    if not known.issuperset(ARCHITECTURES):
        pytest.skip(f"nvcc does not know all of {', '.join(ARCHITECTURES)}")
    return module


#: Bytes of stack at most. The backward kernel of 16-bit rows takes 128 registers so that two blocks fit on a
#: multiprocessor; without that limit it takes 154 on sm_80, and one block fits.
SPILLED = {("layer_norm", "sm_80"): 8}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("op", OPS)
def test_machine_code(op: str, architecture: str, cubins: ModuleType, tmp_path: Path) -> None:
    kernels = cubins.kernels(cubins.compile_cubin(op, architecture, tmp_path))
    most = SPILLED.get((op, architecture), 0)
    wrong = [f"{kernel}: {kernel.stack} bytes of stack" for kernel in kernels if kernel.stack > most]
    for kernel in kernels:
        if (op, kernel.name) in WRITES_A_MAP and not {"4", "8"}.isdisjoint(kernel.arguments[:3]):
            narrow = kernel.code.count("STG") - kernel.code.wide("STG")
            if narrow != WRITES_A_MAP[op, kernel.name] or not kernel.code.wide("STG"):
                wrong.append(f"{kernel}: {narrow} of {kernel.code.count('STG')} stores are not of 16 bytes")
    if op == "batch_norm_act":
        wrong += main_loops(kernels)
    if op == "layer_norm":
        wrong += rows(kernels)
    assert not wrong, "\n".join(wrong)


def main_loops(kernels: list[Any]) -> list[str]:
    """What is wrong with the channels-last kernels."""
    wrong = []
    for name, (maps, plain, added, leaky) in MAIN_LOOPS.items():
        mine = [kernel for kernel in kernels if kernel.name == name]
        wanted = {(dtype, *rest) for dtype in ("float", "Half", "BFloat16") for rest in INSTANCES[name]}
        assert {kernel.arguments for kernel in mine} == wanted, name
        for kernel in mine:
            dtype, activation, residual = (*kernel.arguments, "0", "0")[:3]
            loop, reads = kernel.main_loop, maps + int(residual)
            elements = loop.wide("LDG") // reads * (16 // (4 if dtype == "float" else 2))
            limit = (added if residual == "1" else plain) + (leaky if activation == "2" else 0)
            if loop.wide("LDG") != loop.count("LDG") or loop.wide("LDG") % reads or loop.wide("LDG") == 0:
                wrong.append(f"{kernel}: {loop.wide('LDG')} of {loop.count('LDG')} loads are of 16 bytes")
            elif len(loop) > limit * elements:
                wrong.append(f"{kernel}: {len(loop) / elements:.1f} instructions per element, at most {limit}")
            if kernel.registers > 80:
                wrong.append(f"{kernel}: {kernel.registers} registers, at most 80")
    return wrong


def rows(kernels: list[Any]) -> list[str]:
    """What is wrong with the kernels of layer_norm that read vectors."""
    wrong = []
    for kernel in kernels:
        if kernel.name not in ("rows_kernel", "backward_kernel") or kernel.arguments[2] == "1":
            continue
        narrow = [kernel.code.count(access) - kernel.code.wide(access) for access in ("LDG", "STG")]
        # Mean and rstd, read or written; a block's sums are written column by column.
        most = [2, 2 + 2 * 8 * 4] if kernel.arguments[-1] == "1" and kernel.name == "backward_kernel" else [2, 2]
        if narrow[0] > most[0] or narrow[1] > most[1] or not kernel.code.wide("STG"):
            wrong.append(f"{kernel}: {narrow[0]} loads and {narrow[1]} stores are not of 16 bytes")
        if kernel.registers > 128:
            wrong.append(f"{kernel}: {kernel.registers} registers, at most 128")
    return wrong


def test_a_kernel_is_read_as_it_is(cubins: ModuleType, tmp_path: Path) -> None:
    """Positive control: split stores, a stack and a loop are seen where they are."""
    source = tmp_path / "probe.cu"
    source.write_text(
        """
struct alignas(16) Pack { unsigned short values[8]; };
template <int kSplit>
__global__ void __launch_bounds__(256) probe_kernel(Pack* to, const Pack* from, int count) {
  for (int i = threadIdx.x; i < count; i += 256) {
    Pack pack = from[i];
    if constexpr (kSplit) {
      for (int v = 0; v < 8; ++v) to[i].values[v] = pack.values[v];
    } else {
      __stwb(reinterpret_cast<uint4*>(to + i), *reinterpret_cast<uint4*>(&pack));
    }
  }
}
__global__ void stack_kernel(float* to, int at) {
  float values[64];
  for (int i = 0; i < 64; ++i) values[i * at % 64] = to[i];
  to[at] = values[at];
}
template __global__ void probe_kernel<0>(Pack*, const Pack*, int);
template __global__ void probe_kernel<1>(Pack*, const Pack*, int);
"""
    )
    cubin = tmp_path / "probe.cubin"
    cubins.run(cubins.find_nvcc(), "-cubin", "-arch=sm_90", "-std=c++17", str(source), "-o", str(cubin))
    found = {(kernel.name, *kernel.arguments): kernel for kernel in cubins.kernels(cubin)}
    whole, split = found["probe_kernel", "0"], found["probe_kernel", "1"]
    assert whole.stack == split.stack == 0 and found["stack_kernel",].stack >= 256
    assert whole.main_loop.wide("LDG") == whole.main_loop.count("LDG") > 0
    assert whole.code.wide("STG") == whole.code.count("STG") > 0
    assert split.code.wide("STG") < split.code.count("STG")
    assert 0 < whole.registers < 80 and len(whole.main_loop) < len(whole.code)


def test_what_limits_a_kernel(load_benchmark: Callable[[str], ModuleType]) -> None:
    static = load_benchmark("static_kernels")
    gpu, code = static.GPUS["H200"], static._cubins.Code(())

    def blocks(registers: int, shared: int = 0) -> int:
        return gpu.blocks(static.Kernel("kernel", (), registers, 0, shared, code, ()))

    assert [blocks(registers) for registers in (32, 64, 65, 80, 81, 96, 255)] == [8, 4, 3, 3, 2, 2, 1]
    assert blocks(32, 228 << 10) == 1 and blocks(32, 57 << 10) == 4
    # 132 multiprocessors with 24 KB in flight copy 4.32e12 bytes a second when a byte takes 0.75 us.
    assert static.forecast(gpu, 1024, 32, 6, 4) == (1, "copy")
    assert static.forecast(gpu, 512, 16, 6, 4) == (pytest.approx(0.334, abs=0.001), "in flight")
    assert static.forecast(gpu, 1024, 32, 60, 4) == (pytest.approx(0.516, abs=0.001), "instructions")
    assert {row.op for row in static.ROWS} == set(OPS) - {"supervised_contrast"}  # which computes by torch's products
    text = (static.RESULTS / "kernels-static.md").read_text()
    assert text.startswith(static.HEADING) and all(f"| {row.op} | {row.what} |" in text for row in static.ROWS)

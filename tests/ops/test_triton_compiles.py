"""The Triton kernels compile to GPU code, which needs no GPU and finds what the interpreter lets pass."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from auglocal_ext.ops import providers

pytest.importorskip("triton")

POOL = {"images": "i32", "channels": "i32", "positions": "i32", "classes": "i32", "ignore_index": "i32"}
POOL |= {f"stride_{name}": "i64" for name in ("xn", "xc", "xp", "t")}
KERNELS: list[Any] = [
    ("_pool_kernel", {"X_ptr": f"*{dtype}", "S_ptr": "*fp32", "T_ptr": "*i64", "V_ptr": "*fp32", **POOL}, constants)
    for dtype, constants in (
        ("fp32", {"MEAN": True, "BLOCK_C": 16, "BLOCK_P": 128, "BLOCK_N": 256}),
        ("fp16", {"MEAN": False, "BLOCK_C": 128, "BLOCK_P": 16, "BLOCK_N": 256}),
        ("bf16", {"MEAN": True, "BLOCK_C": 1, "BLOCK_P": 1, "BLOCK_N": 256}),
    )
]
ROWS = {"Z_ptr": "*fp32", "B_ptr": "*fp32", "T_ptr": "*i64", "V_ptr": "*fp32", "D_ptr": "*fp32", "L_ptr": "*fp32"}
ROWS |= {"H_ptr": "*i64", "classes": "i32", "positions": "i32", "ignore_index": "i32", "smoothing": "fp32"}
ROWS |= {"stride_t": "i64"}
KERNELS += [
    ("_rows_kernel", ROWS, {"HAS_BIAS": flag, "NEED_GRAD": flag, "BLOCK_K": size})
    for flag, size in ((True, 1024), (False, 1))
]
FINISH = {"L_ptr": "*fp32", "H_ptr": "*i64", "V_ptr": "*fp32", "D_ptr": "*fp32", "loss_ptr": "*fp32"}
FINISH |= {"correct_ptr": "*i64", "DB_ptr": "*fp32", "images": "i32", "classes": "i32", "positions": "i32"}
KERNELS.append(("_finish_kernel", FINISH, {"BLOCK_N": 128, "BLOCK_K": 32}))


KERNELS = [("pooled_cross_entropy", *kernel) for kernel in KERNELS]

WALK = {name: "i32" for name in ("channels", "positions", "units_an_image", "units", "chunk")}
FACTORS = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "W_ptr": "*fp32", "B_ptr": "*fp32", "slope": "fp32"}
OPTIONS = ("HAS_RESIDUAL", "HAS_WEIGHT", "HAS_BIAS")


def strides(*maps: str) -> dict[str, str]:
    return {f"stride_{name}{dim}": "i64" for name in maps for dim in "ncp"}


for dtype, activation, flag, blocks in (
    ("fp32", "relu", True, {"ALIGN_C": 8, "ALIGN_P": 1, "BLOCK_C": 128, "BLOCK_P": 16}),
    ("bf16", "leaky_relu", False, {"ALIGN_C": 1, "ALIGN_P": 4, "BLOCK_C": 2, "BLOCK_P": 1024}),
    ("fp16", "none", True, {"ALIGN_C": 1, "ALIGN_P": 1, "BLOCK_C": 1, "BLOCK_P": 1}),
):
    maps = {name: f"*{dtype}" for name in ("X_ptr", "R_ptr", "G_ptr", "DX_ptr", "DR_ptr", "Y_ptr")}
    options = {**dict.fromkeys(OPTIONS, flag), "ACTIVATION": activation, **blocks}
    x = {"X_ptr": maps["X_ptr"]}
    finish, square = {"channels": "i32", "splits": "i32"}, {"BLOCK_C": 32, "BLOCK_S": 32}
    outputs = dict.fromkeys(("M_ptr", "mean_ptr", "var_ptr", "RM_ptr", "RV_ptr"), "*fp32")
    backward = {name: maps[name] for name in ("G_ptr", "X_ptr", "R_ptr", "DX_ptr", "DR_ptr")}
    backward |= {"S_ptr": "*fp32", "sum_g_ptr": "*fp32", "sum_gx_ptr": "*fp32", "count": "fp32"}
    KERNELS += [
        ("batch_norm_act", name, types, constants)
        for name, types, constants in (
            ("_stats_kernel", {**x, "M_ptr": "*fp32", **WALK, **strides("x")}, blocks),
            (
                "_finish_stats_kernel",
                {**x, **outputs, **finish, "N_ptr": "*i64", "stride_xc": "i64", "momentum": "fp32", "eps": "fp32"},
                {**dict.fromkeys(("UPDATE", "HAS_RUNNING_MEAN", "HAS_RUNNING_VAR", "HAS_BATCHES"), flag), **square},
            ),
            (
                "_apply_kernel",
                {**x, "R_ptr": f"*{dtype}", "Y_ptr": f"*{dtype}", **FACTORS, **WALK, **strides("x", "r", "y")},
                options,
            ),
            *(
                (
                    "_backward_kernel",
                    {**backward, **FACTORS, **WALK, **strides("g", "x", "r", "d")},
                    {**options, "REDUCE": reduces, "HAS_SUMS": flag, "NEED_RESIDUAL": flag},
                )
                for reduces in (True, False)
            ),
        )
    ]

SUMS = dict.fromkeys(("S_ptr", "rstd_ptr", "sum_g_ptr", "sum_gx_ptr"), "*fp32") | {"channels": "i32", "splits": "i32"}
KERNELS.append(("channelwise", "_finish_sums_kernel", SUMS, {"BLOCK_C": 32, "BLOCK_S": 32}))


POOLED = {name: "i32" for name in ("channels", "positions", "units_an_image", "units", "chunk", "pooled_width")}
VECTORS = {**{name: FACTORS[name] for name in ("mean_ptr", "rstd_ptr", "W_ptr", "B_ptr")}, "slope": "fp32"}


def strides_of_planes(*maps: str) -> dict[str, str]:
    return {f"stride_{name}{dim}": "i64" for name in maps for dim in "nchw"}


for dtype, activation, flag, size, blocks in (
    ("fp32", "relu", True, (3, 3, 2, 2, 1, 1), {"BLOCK_C": 64, "BLOCK_P": 16}),
    ("bf16", "leaky_relu", False, (3, 2, 1, 3, 0, 1), {"BLOCK_C": 2, "BLOCK_P": 512}),
    ("fp16", "none", True, (16, 16, 1, 1, 8, 8), {"BLOCK_C": 1, "BLOCK_P": 1}),
):
    names = ("KERNEL_H", "KERNEL_W", "STRIDE_H", "STRIDE_W", "PADDING_H", "PADDING_W")
    window = dict(zip(names, size, strict=True))
    options = {"HAS_WEIGHT": flag, "HAS_BIAS": flag, "ACTIVATION": activation, **blocks}
    x = {"X_ptr": f"*{dtype}", "I_ptr": "*u8"}
    narrow = {name: value for name, value in window.items() if name != "KERNEL_H"}
    KERNELS += [
        ("batch_norm_act_max_pool", name, types, constants)
        for name, types, constants in (
            (
                "_apply_kernel",
                {**x, "Y_ptr": f"*{dtype}", **VECTORS, **POOLED, "height": "i32", "width": "i32"}
                | strides_of_planes("x", "y"),
                {**window, **options, "UNROLL": size[0] < 4},
            ),
            (
                "_reduce_kernel",
                {**x, "G_ptr": f"*{dtype}", "S_ptr": "*fp32", **VECTORS, **POOLED, **strides_of_planes("g", "i", "x")},
                {**narrow, **options},
            ),
            (
                "_input_grad_kernel",
                {**x, "G_ptr": f"*{dtype}", "DX_ptr": f"*{dtype}", **VECTORS, **POOLED}
                | {"sum_g_ptr": "*fp32", "sum_gx_ptr": "*fp32", "count": "fp32", "width": "i32"}
                | {"pooled_height": "i32", **strides_of_planes("g", "i", "x", "d")},
                {**window, **options, "WINDOWS_H": -(-size[0] // size[2]), "WINDOWS_W": -(-size[1] // size[3])}
                | {"UNROLL": size[0] < 4, "HAS_SUMS": flag},
            ),
        )
    ]

PIXELS = dict.fromkeys(("M_ptr", "S_ptr", "L_ptr"), "*fp32") | dict.fromkeys(("elements", "inner", "blocks"), "i32")
PIXELS |= {f"stride_{name}{dim}": "i64" for name in "xi" for dim in "noi"}
KERNELS += [
    (
        "reconstruction_loss",
        "_pixels_kernel",
        {"X_ptr": f"*{dtype}", "G_ptr": f"*{dtype}", "I_ptr": f"*{image}", **PIXELS},
        {
            "CHANNELS_LAST": flag,
            "DENSE_X": flag,
            "DENSE_I": not flag,
            "NEED_GRAD": need,
            "WIDE": not need,
            "BLOCK": 1024,
        },
    )
    for dtype, image, flag, need in (
        ("fp32", "fp32", False, True),
        ("bf16", "fp32", True, True),
        ("fp16", "fp64", False, False),
        ("fp32", "bf16", True, False),
    )
]
MEAN = {"L_ptr": "*fp32", "loss_ptr": "*fp32", "programs": "i32", "count": "fp32"}
KERNELS.append(("reconstruction_loss", "_mean_kernel", MEAN, {"BLOCK": 1024}))
LABELS = {"T_ptr": "*i64", "classes": "i32", "ignore_index": "i32"}
for dtype, blocks in (
    ("fp32", {"BLOCK_C": 4, "BLOCK_P": 512}),
    ("bf16", {"BLOCK_C": 64, "BLOCK_P": 32}),
    ("fp16", {"BLOCK_C": 1, "BLOCK_P": 2}),
):
    z = {"Z_ptr": f"*{dtype}", "M_ptr": "*fp32", "channels": "i32", "positions": "i32", **strides("z")}
    out = {"DZ_ptr": f"*{dtype}", "D_ptr": "*fp32", "G_ptr": "*fp32", **strides("d")}
    KERNELS += [
        ("similarity_loss", "_statistics_kernel", {**z, "F_ptr": "*fp32"}, blocks),
        ("similarity_loss", "_input_grad_kernel", {**z, **out}, blocks),
    ]
for flag, size in ((True, 16), (False, 4096)):
    rows = {**LABELS, **dict.fromkeys(("F_ptr", "U_ptr", "L_ptr", "V_ptr"), "*fp32"), "channels": "i32", "eps": "fp32"}
    gradient = {"G_ptr": "*fp32", "D_ptr": "*fp32", "row": "i32", "positions": "i32"}
    KERNELS += [
        ("similarity_loss", "_normalise_kernel", {**rows, "images": "i32"}, {"BLOCK_C": size, "BLOCK_N": 256}),
        ("similarity_loss", "_gradient_kernel", {**rows, **gradient}, {"IS_MAP": flag, "BLOCK_C": size}),
    ]
PAIRS = {
    **LABELS,
    "images": "i32",
    "S_ptr": "*fp32",
    "Q_ptr": "*fp32",
    "row": "i32",
    "same": "fp32",
    "different": "fp32",
}
TOTAL = dict.fromkeys(("Q_ptr", "V_ptr", "loss_ptr"), "*fp32") | {"images": "i32"}
KERNELS += [
    ("similarity_loss", "_pairs_kernel", PAIRS, {"BLOCK_N": 1024}),
    ("similarity_loss", "_total_kernel", TOTAL, {"BLOCK_N": 1024}),
]


PAIRS = {"S_ptr": "*fp32", "T_ptr": "*i64", "L_ptr": "*fp32", "A_ptr": "*i64", "first_row": "i32", "images": "i32"}
PAIRS |= {"temperature": "fp32", "ignore_index": "i32", "stride_t": "i64"}
UNITS = {"Z_ptr": "*fp32", "R_ptr": "*fp32", "width": "i32", "least_norm": "fp32"}
TOTAL = {"L_ptr": "*fp32", "A_ptr": "*i64", "loss_ptr": "*fp32", "W_ptr": "*fp32", "images": "i32"}
KERNELS += [
    ("supervised_contrast", name, types, constants)
    for name, types, constants in (
        *(
            (
                "_normalise_kernel",
                {**UNITS, "F_ptr": f"*{dtype}", "stride_fn": "i64", "stride_fd": "i64"},
                {"BLOCK_D": d},
            )
            for dtype, d in (("fp32", 1024), ("fp16", 128), ("bf16", 1))
        ),
        ("_rows_kernel", PAIRS, {"NEED_GRAD": True, "BLOCK_A": 1024}),
        ("_rows_kernel", {**PAIRS, "ignore_index": "i64"}, {"NEED_GRAD": False, "BLOCK_A": 1}),
        ("_total_kernel", {**TOTAL, "temperature": "fp32"}, {"BLOCK_N": 256}),
        *(("_input_grad_kernel", {**UNITS, "D_ptr": "*fp32", "W_ptr": "*fp32"}, {"BLOCK_D": d}) for d in (1, 1024)),
    )
]

OF_ROWS = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "channels": "i32"}
for dtype, vector, flag, rms, blocks in (
    ("fp32", "fp32", True, False, {"BLOCK_R": 2, "BLOCK_C": 1024}),
    ("bf16", "fp32", False, True, {"BLOCK_R": 1, "BLOCK_C": 8192}),
    ("fp16", "fp16", True, False, {"BLOCK_R": 2048, "BLOCK_C": 1}),
):
    maps = dict.fromkeys(("X_ptr", "R_ptr", "Y_ptr", "T_ptr"), f"*{dtype}")
    gradients = dict.fromkeys(("G_ptr", "GT_ptr", "X_ptr", "DX_ptr"), f"*{dtype}")
    weight, bias, sizes = {"W_ptr": f"*{vector}"}, {"B_ptr": f"*{vector}"}, {"rows": "i32", "eps": "fp32"}
    options = {"HAS_RESIDUAL": flag, "HAS_WEIGHT": flag, "HAS_BIAS": flag and not rms, "RMS": rms, **blocks}
    backward = {"HAS_TOTAL": flag, "HAS_WEIGHT": flag, "RMS": rms}
    long = {"BLOCK_C": blocks["BLOCK_C"]}
    needs = {"NEED_WEIGHT": flag, "NEED_BIAS": flag}
    KERNELS += [
        ("layer_norm", name, types, constants)
        for name, types, constants in (
            ("_forward_kernel", {**maps, **weight, **bias, **OF_ROWS, **sizes}, options),
            ("_apply_kernel", {**maps, **weight, **bias, **OF_ROWS, "rows": "i32"}, options),
            (
                "_statistics_kernel",
                {"X_ptr": f"*{dtype}", "R_ptr": f"*{dtype}", **OF_ROWS, "eps": "fp32"},
                {"HAS_RESIDUAL": flag, "RMS": rms, **long},
            ),
            *(
                (
                    "_backward_kernel",
                    {**gradients, **weight, **OF_ROWS, "S_ptr": "*fp32", "rows": "i32", "chunk": "i32"},
                    {**backward, **needs, **blocks, "NEED_X": need},
                )
                for need in (True, False)
            ),
            ("_input_grad_kernel", {**gradients, **weight, **OF_ROWS}, {**backward, **long}),
            (
                "_finish_kernel",
                {**dict.fromkeys(("S_ptr", "DW_ptr", "DB_ptr"), "*fp32"), "channels": "i32", "programs": "i32"},
                {"NEED_WEIGHT": flag, "NEED_BIAS": True, "BLOCK_C": 32, "BLOCK_S": 32},
            ),
        )
    ]


def cases() -> Iterator[Any]:
    """The first of each kernel, and the others in the slow run."""
    seen = set()
    for module, kernel, types, constants in KERNELS:
        marks = [pytest.mark.slow] * ((module, kernel) in seen)
        seen.add((module, kernel))
        yield pytest.param(module, kernel, types, constants, marks=marks)


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")  # Triton 3.9 announces a default of 3.10
@pytest.mark.parametrize(("module", "kernel", "types", "constants"), cases())
def test_kernel_compiles(
    module: str,
    kernel: str,
    types: dict[str, str],
    constants: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    if providers.interpreted():
        pytest.skip("kernels are interpreted in this run")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = getattr(import_module(f"auglocal_ext.ops.triton.{module}"), kernel)
    assert set(function.arg_names) == set(types) | set(constants)
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    compiled = triton.compile(
        ASTSource(fn=function, signature=signature, constexprs=constants), target=GPUTarget("cuda", 90, 32)
    )
    assert compiled.asm["cubin"]

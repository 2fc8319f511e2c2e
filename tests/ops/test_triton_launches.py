"""The Triton kernels as they are specialised at run time: 16 bytes an access, few spills, enough programs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch
from launches import Access, Launch, launched, tensor  # noqa: F401
from torch import Tensor

from auglocal_ext.ops import providers

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(providers.interpreted(), reason="kernels are interpreted in this run"),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),  # Triton 3.9 announces a default of 3.10
]

Launched = Callable[..., list[Launch]]
LOAD, STORE = Access("LDG", 16), Access("STG", 16)
MOST_SPILLED = 8  # bytes of a thread; the ptxas of Triton 3.6 does so to save registers, that of 3.8 nowhere
SHAPE = (64, 16, 32, 32)

layouts = pytest.mark.parametrize("layout", ["channels-last", "contiguous"])
configurations = pytest.mark.parametrize(
    ("capability", "dtype", "shape"),
    [
        (90, torch.bfloat16, SHAPE),
        *(
            pytest.param(*values, marks=pytest.mark.slow)
            for values in (
                (80, torch.bfloat16, SHAPE),
                (89, torch.bfloat16, SHAPE),
                (90, torch.float32, SHAPE),
                (90, torch.bfloat16, (1024, 64, 8, 8)),
                (90, torch.bfloat16, (64, 64, 56, 56)),
            )
        ),
    ],
    ids=str,
)


def vectors(channels: int, count: int) -> list[Tensor]:
    return [torch.empty(channels) for _ in range(count)]


def assert_wide(launch: Launch, *kinds: Access) -> None:
    """Every access in a loop is of 16 bytes a thread, and there are these."""
    for loop in launch.loops:
        assert set(loop) == set(kinds), f"{launch.name}: {loop}"
    assert launch.spilled <= MOST_SPILLED, f"{launch.name} spills {launch.spilled} bytes"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "shape", "layout", "bytes_an_access"),
    [
        (torch.bfloat16, (64, 16, 14, 14), "contiguous", 8),
        (torch.bfloat16, (64, 16, 7, 7), "contiguous", 2),
        (torch.float32, (64, 16, 14, 14), "contiguous", 16),
        (torch.bfloat16, (64, 24, 7, 7), "channels-last", 16),
        (torch.bfloat16, (64, 10, 8, 8), "channels-last", 4),
    ],
    ids=str,
)
def test_sizes_that_are_no_multiple_of_16(
    launched: Launched,  # noqa: F811
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
    bytes_an_access: int,
) -> None:
    from auglocal_ext.ops.triton import batch_norm_act as op

    x, factors, sums = tensor(shape, dtype, layout), vectors(shape[1], 4), vectors(shape[1], 2)
    stats, _ = launched(90, op.stats, x)
    (apply,) = launched(90, op.apply, x, *factors, x, 0.0)
    (input_grad,) = launched(90, op.input_grad, x, x, *factors, x, 0.0, *sums, True)
    for launch in (stats, apply, input_grad):
        assert {access.bytes for loop in launch.loops for access in loop} == {bytes_an_access}, launch.name


def test_maps_of_two_layouts(launched: Launched) -> None:  # noqa: F811
    """What stands together in one of them does not in the other."""
    from auglocal_ext.ops.triton import batch_norm_act as op

    x, residual = (tensor((64, 24, 14, 14), torch.bfloat16, layout) for layout in ("contiguous", "channels-last"))
    (apply,) = launched(90, op.apply, x, *vectors(24, 4), residual, 0.0)
    assert {access.bytes for loop in apply.loops for access in loop} == {2}


@layouts
@configurations
@pytest.mark.parametrize(
    "with_residual", [pytest.param(False, marks=pytest.mark.slow), True], ids=["plain", "residual"]
)
def test_batch_norm_act(
    launched: Launched,  # noqa: F811
    capability: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
    with_residual: bool,
) -> None:
    from auglocal_ext.ops.triton import batch_norm_act as op

    x, factors = tensor(shape, dtype, layout), vectors(shape[1], 4)
    residual = tensor(shape, dtype, layout) if with_residual else None
    sums = vectors(shape[1], 2)
    stats, _ = launched(capability, op.stats, x)
    (apply,) = launched(capability, op.apply, x, *factors, residual, 0.0)
    reduce, _ = launched(capability, op.reduce, x, x, *factors, residual, 0.0)
    (input_grad,) = launched(capability, op.input_grad, x, x, *factors, residual, 0.0, *sums, with_residual)
    for reduction in (stats, reduce):
        assert_wide(reduction, LOAD)
    for elementwise in (apply, input_grad):
        assert_wide(elementwise, LOAD, STORE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [768, 16384], ids=["whole rows", "long rows"])
def test_layer_norm(launched: Launched, dtype: torch.dtype, channels: int) -> None:  # noqa: F811
    """Maps are read and written by 16 bytes; what is smaller are numbers of a row, which threads share."""
    from auglocal_ext.ops.triton import layer_norm as op

    x, (weight, bias), (mean, rstd) = torch.empty(4096, channels, dtype=dtype), vectors(channels, 2), vectors(4096, 2)
    found = launched(90, op.forward, x, x, weight, bias, 1e-5, False)
    found += launched(90, op.backward, x, x, x, mean, rstd, weight, False, True, True, True)
    of_a_map = dtype.itemsize  # accesses of a thread, for 16 elements
    maps = {  # that are read in a loop at least, and those written
        "_forward_kernel": (2, 2),
        "_statistics_kernel": (2, 0),
        "_apply_kernel": (2, 2),
        "_input_grad_kernel": (2, 1),
        "_backward_kernel": (3, 1) if channels == 768 else (2, 0),
    }
    names = [launch.name for launch in found]
    assert names[-1] == "_finish_kernel" and len(names) == (3 if channels == 768 else 5)
    for launch in found[:-1]:
        reads, writes = maps[launch.name]
        *_, loop = launch.loops
        assert loop.count(LOAD) >= reads * of_a_map and loop.count(STORE) == writes * of_a_map, launch
        assert all(access.bytes >= 4 for access in loop)
        assert launch.spilled <= MOST_SPILLED, f"{launch.name} spills {launch.spilled} bytes"
    assert_wide(found[-1], LOAD)


@pytest.mark.slow
@layouts
@configurations
def test_similarity_loss(
    launched: Launched,  # noqa: F811
    capability: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
) -> None:
    from auglocal_ext.ops.triton import similarity_loss as op

    z, target = tensor(shape, dtype, layout), torch.zeros(shape[0], dtype=torch.int64)
    per_channel = [torch.empty(shape[:2]) for _ in range(2)]
    statistics, *_ = launched(capability, op.forward, z, target, 10, -100, True)
    (input_grad,) = launched(capability, op.input_grad, z, *per_channel, torch.empty(()))
    assert_wide(statistics, LOAD)
    assert_wide(input_grad, LOAD, STORE)


@pytest.mark.slow
@layouts
@configurations
def test_pooled_cross_entropy(
    launched: Launched,  # noqa: F811
    capability: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
) -> None:
    from auglocal_ext.ops.triton import pooled_cross_entropy as op

    x, target = tensor(shape, dtype, layout), torch.zeros(shape[0], dtype=torch.int64)
    head = torch.empty(10, shape[1]), torch.empty(10)
    pool, *_ = launched(capability, op.forward, x, *head, target, -100, 0.0, True, True, True, True)
    assert_wide(pool, LOAD)


@pytest.mark.slow
@layouts
@configurations
def test_reconstruction_loss(
    launched: Launched,  # noqa: F811
    capability: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    layout: str,
) -> None:
    from auglocal_ext.ops.triton import reconstruction_loss as op

    shape = (shape[0], 3, *shape[2:])
    logits, image = tensor(shape, dtype, layout), tensor(shape, torch.float32, layout)
    pixels, _ = launched(capability, op.forward, logits, image, *vectors(3, 2), True)
    (accesses,) = pixels.loops
    # 8 elements of a thread, beside what a channel's mean and deviation are looked up with, and a sum.
    wide = 8 * logits.element_size() // 16
    assert accesses.count(LOAD) == wide + 2 and accesses.count(STORE) == wide
    assert pixels.spilled <= MOST_SPILLED


@pytest.mark.slow
@configurations
def test_max_pool(
    launched: Launched,  # noqa: F811
    capability: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
) -> None:
    """In channels-last maps. Beside 16 bytes of a map there are the 8 that say where the maxima of 8 windows were."""
    from auglocal_ext.ops.triton import batch_norm_act_max_pool as op

    window = (3, 3, 2, 2, 1, 1)
    x, factors, sums = tensor(shape, dtype, "channels-last"), vectors(shape[1], 4), vectors(shape[1], 2)
    y = tensor((*shape[:2], shape[2] // 2, shape[3] // 2), dtype, "channels-last")
    (apply,) = launched(capability, op.apply, x, *factors, 0.0, *window)
    (input_grad,) = launched(capability, op.input_grad, y, y.byte(), x, *factors, 0.0, *sums, *window)
    assert_wide(apply, LOAD, STORE, Access("STG", 8))
    assert_wide(input_grad, LOAD, Access("LDG", 8), STORE)


@pytest.mark.parametrize(
    ("shape", "least"),
    [((1024, 16, 32, 32), 4096), ((1024, 64, 8, 8), 1024), ((256, 256, 56, 56), 7680), ((256, 64, 112, 112), 7680)],
    ids=str,
)
@layouts
def test_elementwise_passes_have_enough_programs(shape: tuple[int, ...], layout: str, least: int) -> None:
    """An H200 holds 500 to 2100 of them at a time: a last wave of 2048 would leave it half empty for long."""
    from auglocal_ext.ops.triton.channelwise import Plan

    images, channels, height, width = shape
    plan = Plan(images, channels, height * width, channels_last=layout == "channels-last", elements=2048, reduces=False)
    tiles, splits = plan.grid
    *_, units, chunk = plan.sizes
    assert least <= tiles * splits <= 2**14 and chunk >= 2
    assert (splits - 1) * chunk < units <= splits * chunk


def test_pairs(launched: Launched) -> None:  # noqa: F811
    from auglocal_ext.ops.triton import similarity_loss, supervised_contrast

    features, target = torch.empty(1024, 64), torch.zeros(1024, dtype=torch.int64)
    found = launched(90, similarity_loss.forward, features, target, 10, -100, True)
    assert_wide(next(launch for launch in found if launch.name == "_pairs_kernel"), LOAD, STORE)
    found = launched(90, supervised_contrast.forward, features, target, 0.1, -100, True)
    *_, writing = next(launch for launch in found if launch.name == "_rows_kernel").loops
    assert set(writing) == {LOAD, STORE}

"""The loops of the cpu provider give the same bits with every set of vector instructions and number of threads."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import column
import pytest
import torch
from torch import Tensor

from auglocal_ext import ops

OP = "batch_norm_act"
HERE = Path(__file__).resolve().parent
LEVELS = {"avx2": torch.cpu._is_avx2_supported, "avx512": torch.cpu._is_avx512_supported}
NARROW = [torch.float16, torch.bfloat16]

SHAPES = [(5, 7, 3, 4), (3, 16, 8, 8), (2, 24, 40, 41), (70, 20, 3, 3), (2, 300, 4, 5), (33, 10, 1, 1), (1, 3, 96, 97)]
LAYOUTS = ["contiguous", "channels-last", "channel-slice", "row-slice", "transposed"]
WINDOWS = [(3, 3, 2, 2, 1, 1), (2, 3, 1, 2, 0, 1), (2, 2, 2, 2, 0, 0), (2, 1, 3, 3, 0, 0)]


def results(maps: list[list[Tensor]]) -> Iterator[Tensor]:
    """What every pass makes of maps and of vectors for their channels."""
    for (x, residual, grad, *vectors), dtype, layout in itertools.product(maps, column.DTYPES, LAYOUTS):
        x, residual, grad = (column.LAYOUTS[layout](tensor).to(dtype) for tensor in (x, residual, grad))
        factors = tuple(v.to(torch.float64 if dtype == torch.float64 else torch.float32) for v in vectors)
        yield from column.op("batch_norm_stats", "cpu")(x)
        for added, slope in ((None, 0.0), (residual, 0.0), (residual, 0.1)):
            rest = (x, *factors, added, slope)
            yield column.op("batch_norm_act_apply", "cpu")(*rest)
            sums = column.op("batch_norm_act_reduce", "cpu")(grad, *rest)
            yield from sums
            yield from column.op("batch_norm_act_input_grad", "cpu")(grad, *rest, *sums, True)
        mean, deviation = factors[:2]
        yield from column.op("reconstruction_loss", "cpu")(x, residual, mean, deviation, True)
        yield from losses(x, residual, deviation)
        yield from rows(x, residual, grad)
        if x.shape[2] > 2:
            for window, slope in zip(WINDOWS, (0.0, 0.1, 1.0, 0.0), strict=True):
                y, places = column.op("batch_norm_act_max_pool_apply", "cpu")(x, *factors, slope, *window)
                upstream = y.roll(1, 0)
                yield from (y, places)
                rest = (upstream, places, x, *factors, slope)
                sums = column.op("batch_norm_act_max_pool_reduce", "cpu")(*rest, *window)
                yield from sums
                yield column.op("batch_norm_act_max_pool_input_grad", "cpu")(*rest, *sums, *window)


def rows(*maps: Tensor) -> Iterator[Tensor]:
    """Those over rows of the last dimension, some of which are longer than a run of sums."""
    for width in (maps[0].shape[-1], maps[0].numel() // 2):
        count = maps[0].numel() // width
        x, residual, grad = (tensor.flatten()[: count * width].view(count, width) for tensor in maps)
        weight, bias = residual[0], grad[0].float()
        for rms in (False, True):
            y, total, mean, rstd = column.op("layer_norm_forward", "cpu")(
                x, residual, weight, None if rms else bias, 1e-5, rms
            )
            yield from (y, total, mean, rstd)
            rest = (total, mean, rstd, weight)
            yield column.op("layer_norm_apply", "cpu")(*rest, None, rms)
            yield from column.op("layer_norm_backward", "cpu")(grad, x, *rest, rms, True, True, True)


def losses(x: Tensor, other: Tensor, grad: Tensor) -> Iterator[Tensor]:
    """Those over labels, of which one is ignored."""
    images, channels = x.shape[:2]
    target = torch.arange(images) % 3
    target[-1] = -100
    weight = other[0, :, 0, 0] * torch.arange(-18, 19).to(x.dtype).unsqueeze(1)
    yield from column.op("pooled_cross_entropy", "cpu")(x, weight, None, target, -100, 0.1, *(True,) * 4)
    yield from column.op("supervised_contrast", "cpu")(x[:, :, 0, 0], target, 0.1, -100, True)
    yield from rows_of_logits(x, target)
    if x.shape[2] * x.shape[3] == 1:
        yield from column.op("similarity_loss", "cpu")(x.flatten(1), target, 10, -100, True)
        return
    loss, mean, factor = column.op("similarity_loss", "cpu")(x, target, 10, -100, True)
    yield from (loss, mean, factor)
    yield column.op("similarity_loss_input_grad", "cpu")(x, mean, factor, grad[0])


def rows_of_logits(x: Tensor, target: Tensor) -> Iterator[Tensor]:
    """What linear_cross_entropy makes of its logits, in place."""
    logits = x.reshape(len(x), -1).to(torch.promote_types(x.dtype, torch.float32), copy=True)
    rounded = torch.empty_like(logits, dtype=torch.bfloat16)
    bias, grad_bias, totals = logits[0].clone(), torch.zeros_like(logits[0]), torch.zeros(3, dtype=torch.float64)
    rest = (target, -100, 0.1, 1e-2, 0.5, True, rounded, grad_bias, totals)
    column.op("linear_cross_entropy_rows_", "cpu")(logits, bias, *rest)
    yield from (logits, rounded, grad_bias, totals)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Whose order of additions torch does not choose."""
    total = a[:, :1] * b[:1]
    for k in range(1, len(b)):
        total += a[:, k : k + 1] * b[k : k + 1]
    return total


def write(source: str, target: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm", product, "CPU")
        torch.save(list(results(torch.load(source))), target)


def run(folder: Path, level: str, threads: int) -> list[Tensor]:
    """Those of another process, which may use these instructions."""
    column.need("cpu", "cpu")
    target = folder / f"{level}-{threads}.pt"
    code = f"import sys; sys.path.insert(0, {str(HERE)!r}); import test_vector_levels as t; t.write(*sys.argv[1:])"
    subprocess.run(
        [sys.executable, "-c", code, str(folder / "maps.pt"), str(target), str(threads)],
        env={**os.environ, "ATEN_CPU_CAPABILITY": level},
        cwd=HERE.parent.parent,
        check=True,
    )
    return torch.load(target)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("levels")
    generator, maps = torch.Generator().manual_seed(0), []
    for shape in SHAPES:
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]
        vectors = torch.randn(4, shape[1], generator=generator, dtype=torch.float64)
        maps.append([*drawn, vectors[0], vectors[1].abs() + 0.5, vectors[2], vectors[3]])
    maps[1][0][0, 0, 0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    torch.save(maps, folder / "maps.pt")
    return folder


@pytest.fixture(scope="module")
def without_vectors(folder: Path) -> list[Tensor]:
    return run(folder, "default", 1)


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_bits_do_not_depend_on_level_and_threads(level: str, folder: Path, without_vectors: list[Tensor]) -> None:
    if not LEVELS[level]():
        pytest.skip(f"the processor has no {level}")
    found = run(folder, level, 3)
    assert len(found) > 1000
    for mine, other in zip(found, without_vectors, strict=True):
        assert mine.stride() == other.stride()
        torch.testing.assert_close(mine, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("provider", ["cpu"])
@pytest.mark.parametrize("dtype", NARROW, ids=["float16", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_conversions_are_those_of_torch(provider: str, dtype: torch.dtype, layout: str) -> None:
    """Of every number that the dtype has, and rounding of products of these."""
    numbers = torch.arange(2**16).to(torch.int16).view(dtype)[:-3]  # no multiple of any vector
    scales = torch.tensor([1, 2**-9, 1 / 3, 1 + 2**-11, 3 * 2**-14, 2**0.5 * 1e4])
    x = numbers.expand(1, len(scales), -1).contiguous()
    if layout == "channels-last":
        x = x.mT.contiguous().mT
    zeros = torch.zeros_like(scales)
    found = ops.batch_norm_act_apply(x, zeros, scales, None, -zeros, None, "none", provider=provider)
    expected = (x.float() * scales[:, None]).to(dtype)
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    # Compared as integers: zeros have their signs.
    assert torch.equal(found.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


@pytest.mark.parametrize("provider", ["cpu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(7, 10, 3, 3), (40, 24, 2, 2), (2, 258, 2, 3), (2, 3, 17, 18)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_stay_in_their_channel(provider: str, layout: str, shape: tuple[int, ...], value: float) -> None:
    """Also in vectors that have more elements than are left of a row, or those of several channels."""
    generator = torch.Generator().manual_seed(0)
    clean, grad = (torch.randn(shape, generator=generator).to(torch.bfloat16) for _ in range(2))
    broken = clean.clone()
    broken[-1, 1, -1, -1] = value
    weight, bias = torch.rand(shape[1], generator=generator), torch.randn(shape[1], generator=generator)

    def run(x: Tensor, pool: bool) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in (column.LAYOUTS[layout](x), weight, bias)]
        op = ops.batch_norm_act_max_pool if pool else ops.batch_norm_act
        running = torch.zeros(shape[1]), torch.ones(shape[1])
        y = op(*leaves, *running, training=True, provider=provider)
        upstream = grad[..., : y.shape[2], : y.shape[3]]
        found = [y.detach(), *running, *torch.autograd.grad(y, leaves, upstream)]
        return [tensor.movedim(min(tensor.dim() - 1, 1), 0) for tensor in found]

    for pool in (False, True):
        found, expected = run(broken, pool), run(clean, pool)
        assert not any(tensor[1].isfinite().all() for tensor in found[:3])  # y and the running statistics
        others = torch.arange(shape[1]) != 1
        assert all(torch.equal(a[others], b[others]) for a, b in zip(found, expected, strict=True))

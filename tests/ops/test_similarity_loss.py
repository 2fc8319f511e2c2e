"""similarity_loss: every provider against the composition of torch's ops in float64 and in the same dtype."""

from __future__ import annotations

import os
from importlib import import_module

import column
import fence
import pytest
import torch
from torch import Tensor

from auglocal_ext.ops import providers, similarity_loss
from auglocal_ext.ops.layout import empty_like
from auglocal_ext.ops.reference import similarity_loss as reference

OP = "similarity_loss"
IGNORE = -100
SHAPES = [
    (5, 7, 3, 4),
    (4, 19, 7, 7),
    (3, 16, 8, 8),
    (2, 130, 6, 5),
    (20, 5, 2),
    (17, 10),
    (3, 300),
    (2, 5, 11),
    (2, 3, 2, 3, 4),
    (6, 1, 4, 4),
]


def similarity_matrix(features: Tensor) -> Tensor:
    centred = features - features.mean(1, keepdim=True)
    unit = centred / (centred.norm(dim=1, keepdim=True) + 1e-8)
    return (unit @ unit.t()).clamp(-1, 1)


def composition(z: Tensor, target: Tensor, classes: int, ignore_index: int = IGNORE) -> Tensor:
    """The ops of torch that the op stands for, over the images that count."""
    features = z.flatten(2).std(2) if z.dim() > 2 else z
    one_hot = (target[:, None] == torch.arange(classes, device=target.device)).to(features.dtype)
    counted = one_hot.sum(1) * (target != ignore_index)
    difference = (similarity_matrix(features) - similarity_matrix(one_hot)).square()
    pairs = counted[:, None] * counted
    return (difference * pairs).sum() / pairs.sum()


def inputs(shape: tuple[int, ...], classes: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    # Deviations that differ from channel to channel, as a network's do.
    scale = torch.rand(*shape[:2], *(1,) * (len(shape) - 2), device=device) + 0.1
    target = torch.randint(classes, shape[:1], device=device)
    if shape[0] > 2:
        target[::3] = IGNORE
    return (torch.randn(shape, device=device) * scale).to(dtype), target


def compare(z: Tensor, target: Tensor, classes: int, provider: str, ignore_index: int = IGNORE) -> None:
    """Loss and gradient against the composition in float64, and in the dtype in which everything is accumulated."""
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32

    def run(function, dtype):
        leaf = z.detach().to(dtype).requires_grad_()
        loss = function(leaf, target, classes, ignore_index=ignore_index)
        return loss, *torch.autograd.grad(loss * 3, leaf)  # an upstream gradient other than 1, as in a sum of losses

    ours, grad = run(lambda *a, **options: similarity_loss(*a, provider=provider, **options), z.dtype)
    same, same_grad = run(composition, wide)
    oracle, oracle_grad = run(composition, torch.float64)
    assert ours.dtype == wide and grad.dtype == z.dtype and grad.stride() == empty_like(z).stride()
    column.assert_close("loss", ours, same, oracle)
    # An image whose features are nearly equal magnifies rounding, in torch and here, but not by the same digits.
    worst = (oracle_grad - same_grad.to(z.dtype)).abs().max()
    column.assert_close("gradient of z", grad, oracle_grad + 3 * worst, oracle_grad)


@column.cases
@column.dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_shapes(device: str, provider: str, dtype: torch.dtype, shape: tuple[int, ...], poison: None) -> None:
    compare(*inputs(shape, 6, dtype, device), 6, provider)


@column.cases
@column.dtypes
@pytest.mark.parametrize("layout", [name for name in column.LAYOUTS if name != "expanded-positions"])
def test_layouts(device: str, provider: str, dtype: torch.dtype, layout: str, poison: None) -> None:
    z, target = inputs((4, 24, 4, 8), 3, dtype, device)
    compare(column.LAYOUTS[layout](z), target, 3, provider)


@column.cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(3, 3, 37, 39), (3, 8, 16, 36), (2, 320, 9, 16), (2, 600, 2, 3)], ids=str)
def test_maps_larger_than_one_pass_of_a_block(
    device: str, provider: str, dtype: torch.dtype, layout: str, shape: tuple[int, ...], poison: None
) -> None:
    z, target = inputs(shape, 6, dtype, device)
    compare(column.LAYOUTS[layout](z), target, 6, provider)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("device", "provider"), [case for case in column.CASES if case.values[0] == "cpu"])
@pytest.mark.parametrize("images", [1030, 1100, 1280, 1536, 3072])
def test_no_product_is_read_past_its_last_row(device: str, provider: str, images: int) -> None:
    """The blocks of rows of these batches are no multiple of the eight rows that a block of threads has."""
    if images > {"cpu": 3072, "cuda": 1280, "triton": 1030}.get(provider, 0):
        pytest.skip("plain PyTorch" if provider == "reference" else "takes long where kernels are emulated")
    z, target = inputs((images, 5), 6, torch.float32, device)
    fence.survives(lambda: compare(z, target, 6, provider))


@column.cases
@pytest.mark.parametrize("channels_last", [False, True])
def test_slice_of_an_aligned_row(device: str, provider: str, channels_last: bool, poison: None) -> None:
    z, target = inputs((3, 32, 64), 6, torch.float32, device)
    compare(z.mT.contiguous().mT[:, :30] if channels_last else z[..., :62], target, 6, provider)


@column.cases
@column.dtypes
def test_columns_of_a_channels_last_map(device: str, provider: str, dtype: torch.dtype, poison: None) -> None:
    """The gradient is channels-last, while the map itself is read from a contiguous copy."""
    z, target = inputs((3, 5, 6, 7), 3, dtype, device)
    compare(column.LAYOUTS["channels-last"](z)[..., 1:], target, 3, provider)


@column.cases
@pytest.mark.parametrize("strides", [(7, 1), (1, 5), (3, 2)], ids=str)
def test_strides_of_vectors(device: str, provider: str, strides: tuple[int, int], poison: None) -> None:
    z = torch.randn(40, device=device).as_strided((5, 7), strides)
    compare(z, torch.tensor([0, 1, 2, 0, 1], device=device), 3, provider)


@column.cases
@pytest.mark.parametrize("shape", [(9, 6, 4, 4), (9, 6)], ids=["map", "vectors"])
@pytest.mark.parametrize("classes", [1, 2, 3, 1000])
def test_classes(device: str, provider: str, classes: int, shape: tuple[int, ...], poison: None) -> None:
    compare(*inputs(shape, classes, torch.float32, device), classes, provider)
    if torch.float64 in providers.TABLES[OP].row(provider).dtypes:  # where 1e-8 beside a length is a digit
        compare(*inputs(shape, classes, torch.float64, device), classes, provider)


@pytest.mark.parametrize(("classes", "same", "different"), [(2, 1, -1), (3, 1, -1 / 2), (10, 1, -1 / 9)])
def test_wanted_similarities(classes: int, same: float, different: float) -> None:
    assert reference.wanted(classes) == pytest.approx((same, different), abs=1e-7)
    assert reference.wanted(1)[0] == 0  # a single class: its one-hot rows are constant


@column.cases
def test_ignored_class(device: str, provider: str, poison: None) -> None:
    z, target = inputs((7, 5, 2, 3), 4, torch.float32, device)
    target[0] = 2
    compare(z, target.clamp(min=0), 4, provider, ignore_index=2)


@column.cases
@pytest.mark.parametrize("shape", [(6, 4, 2, 2), (6, 4)], ids=["map", "vectors"])
def test_images_that_do_not_count_are_not_looked_at(
    device: str, provider: str, shape: tuple[int, ...], poison: None
) -> None:
    z, target = inputs(shape, 5, torch.float32, device)
    bad = target.clone()
    bad[target == IGNORE] = torch.tensor([5, -1], device=device)
    z[target == IGNORE] = torch.tensor([float("nan"), float("inf")], device=device).view(2, *(1,) * (len(shape) - 1))
    leaf = z.requires_grad_()
    loss = similarity_loss(leaf, bad, 5, provider=provider, check_labels=False)
    (grad,) = torch.autograd.grad(loss, leaf)
    counted = target != IGNORE
    kept = z.detach()[counted].requires_grad_()
    expected = composition(kept, target[counted], 5)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(grad[counted], torch.autograd.grad(expected, kept)[0])
    if z.dim() == 2:
        assert bool((grad[~counted] == 0).all())


@column.cases
@pytest.mark.parametrize("shape", [(3, 4, 2, 2), (3, 4)], ids=["map", "vectors"])
def test_all_labels_ignored(device: str, provider: str, shape: tuple[int, ...], poison: None) -> None:
    z, target = inputs(shape, 5, torch.float32, device)
    z.requires_grad_()
    loss = similarity_loss(z, target.fill_(IGNORE), 5, provider=provider)
    assert loss.isnan() and composition(z, target, 5).isnan()
    assert torch.equal(torch.autograd.grad(loss, z)[0], torch.zeros_like(z))


@column.cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_constant_channels_have_no_gradient(device: str, provider: str, layout: str, poison: None) -> None:
    z, target = inputs((6, 5, 9, 7), 3, torch.float32, device)
    z[:, 1] = 0.1
    z[2, 3] = 1e4 / 3
    z = column.LAYOUTS[layout](z).requires_grad_()
    loss = similarity_loss(z, target, 3, provider=provider)
    (grad,) = torch.autograd.grad(loss, z)
    assert torch.isfinite(loss) and torch.isfinite(grad).all()
    assert bool((grad[:, 1] == 0).all()) and bool((grad[2, 3] == 0).all()) and bool((grad[1, 0] != 0).any())
    torch.testing.assert_close(loss, composition(z, target, 3))


@column.cases
def test_an_image_of_constants_is_like_no_other(device: str, provider: str, poison: None) -> None:
    z, target = inputs((6, 5, 3, 3), 3, torch.float32, device)
    z[1] = 2.0
    z.requires_grad_()
    (grad,) = torch.autograd.grad(similarity_loss(z, target, 3, provider=provider), z)
    assert torch.isfinite(grad).all() and bool((grad[1] == 0).all())
    torch.testing.assert_close(grad, torch.autograd.grad(composition(z, target, 3), z)[0])


@column.cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("case", ["mean", "outlier first", "outlier"])
def test_digits_of_the_deviation(device: str, provider: str, layout: str, case: str) -> None:
    z, target = inputs((5, 4, 16, 24), 3, torch.float32, device)
    if case == "mean":
        z += torch.tensor([1e4, -1e4, 3e3, 0.0], device=device).view(1, 4, 1, 1)
    else:
        row, column_ = (0, 0) if case == "outlier first" else (5, 7)
        z[:, :, row, column_] = 1e4 * torch.rand(5, 4, device=device)
    z = column.LAYOUTS[layout](z)
    _, mean, factor = column.op(OP, provider)(z, target, 3, IGNORE, True)
    features = z.double().flatten(2).std(2).requires_grad_()
    exact_mean = z.double().mean((2, 3))
    assert bool(((mean - exact_mean).abs() <= 1e-6 * exact_mean.abs() + 3e-6 * features.detach()).all())
    (grad,) = torch.autograd.grad(composition(features, target, 3), features)
    wanted = grad / (features.detach() * (16 * 24 - 1))
    assert float((factor - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())


@column.cases
def test_blocks_of_rows(device: str, provider: str, monkeypatch: pytest.MonkeyPatch, poison: None) -> None:
    """Similarities made some rows at a time, of which the last are fewer, are those made at once."""
    images = {"cuda": 1030, "cpu": 400}.get(provider, 24)  # compiled code says itself how many at a time
    if provider not in ("cuda", "cpu"):
        where = "reference" if provider == "aten" else provider  # whose forward pass aten runs
        monkeypatch.setattr(import_module(f"auglocal_ext.ops.{where}.{OP}"), "BLOCK", 7 * images)
    compare(*inputs((images, 4), 5, torch.float32, device), 5, provider)


@column.cases
def test_nothing_of_all_pairs_is_kept(device: str, provider: str) -> None:
    z, target = inputs((12, 3, 4, 4), 5, torch.float16, device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        similarity_loss(z.requires_grad_(), target, 5, provider=provider)
    assert [t.shape for t in kept] == [z.shape, (12, 3), (12, 3)]
    assert kept[0].data_ptr() == z.data_ptr()
    kept.clear()
    vectors = z.detach().flatten(1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        similarity_loss(vectors, target, 5, provider=provider)
    assert [t.shape for t in kept] == [vectors.shape] and kept[0].dtype == torch.float32

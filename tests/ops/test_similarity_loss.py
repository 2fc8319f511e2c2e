"""similarity_loss: every provider against the composition of torch's ops in float64 and in the same dtype."""

from __future__ import annotations

import os
from importlib import import_module

import column
import fence
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from auglocal_ext.ops import providers, similarity_loss
from auglocal_ext.ops.layout import empty_like
from auglocal_ext.ops.reference import similarity_loss as reference
from auglocal_ext.ops.similarity_loss import channel_std

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
@pytest.mark.parametrize("shape", [(3, 3, 37, 39), (3, 8, 16, 36), (2, 320, 9, 16)], ids=str)
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
        monkeypatch.setattr(import_module(f"auglocal_ext.ops.{provider}.{OP}"), "BLOCK", 7 * images)
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


class Calls(TorchDispatchMode):
    """Records whether the op is asked for a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.needs: list[bool] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if f"{OP}." in str(function):
            self.needs.append(args[4])
        return function(*args, **(kwargs or {}))


@column.cases
@pytest.mark.parametrize("shape", [(5, 7, 3, 4), (5, 7)], ids=["map", "vectors"])
def test_no_gradient_is_made_where_none_is_needed(device: str, provider: str, shape: tuple[int, ...]) -> None:
    z, target = inputs(shape, 6, torch.float32, device)
    with Calls() as calls:
        plain = similarity_loss(z, target, 6, provider=provider)
        with torch.no_grad():
            silent = similarity_loss(z.clone().requires_grad_(), target, 6, provider=provider)
        needed = similarity_loss(z.clone().requires_grad_(), target, 6, provider=provider)
    assert calls.needs == [False, False, True]
    assert plain.grad_fn is None and silent.grad_fn is None and needed.requires_grad
    assert torch.equal(plain, silent) and torch.equal(plain, needed)
    made = column.op(OP, provider)(z, target, 6, IGNORE, False)[1:]
    assert [m.numel() for m in made] == [0, 0]


@column.cases
@pytest.mark.parametrize("shape", [(19, 33, 5, 5), (19, 33)], ids=["map", "vectors"])
def test_bitwise_repeatable(device: str, provider: str, shape: tuple[int, ...]) -> None:
    z, target = inputs(shape, 4, torch.float32, device)

    def once() -> list[Tensor]:
        leaf = z.clone().requires_grad_()
        loss = similarity_loss(leaf, target, 4, provider=provider)
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    for first, again in zip(once(), once(), strict=True):
        assert torch.equal(first, again)


@pytest.mark.parametrize("provider", ["reference", "cpu"])
@pytest.mark.parametrize("shape", [(4, 5, 2, 3), (4, 5)], ids=["map", "vectors"])
def test_gradcheck(provider: str, shape: tuple[int, ...]) -> None:
    z, target = inputs(shape, 3, torch.float64, "cpu")
    torch.autograd.gradcheck(lambda leaf: similarity_loss(leaf, target, 3, provider=provider), z.requires_grad_())


@column.cases
@pytest.mark.parametrize("shape", [(4, 6, 3, 2), (4, 6)], ids=["map", "vectors"])
def test_opcheck(device: str, provider: str, shape: tuple[int, ...]) -> None:
    z, target = inputs(shape, 5, torch.float32, device)
    leaf = (z.transpose(2, 3) if z.dim() > 2 else z).detach().requires_grad_()
    torch.library.opcheck(column.op(OP, provider), (leaf, target, 5, IGNORE, True))
    torch.library.opcheck(column.op(OP, provider), (z, target, 5, IGNORE, False))
    if z.dim() > 2:
        _, mean, factor = column.op(OP, provider)(z, target, 5, IGNORE, True)
        for map_ in (z.transpose(2, 3), z.contiguous(memory_format=torch.channels_last)):
            grad = torch.tensor(2.0, device=device)
            torch.library.opcheck(column.op(f"{OP}_input_grad", provider), (map_, mean, factor, grad))


@column.cases
@pytest.mark.parametrize("shape", [(4, 6, 3, 2), (4, 6)], ids=["map", "vectors"])
def test_compiles_as_one_graph(device: str, provider: str, shape: tuple[int, ...]) -> None:
    z, target = inputs(shape, 5, torch.float32, device)

    def step(z: Tensor) -> Tensor:
        return similarity_loss(z * 2, target, 5, provider=provider)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = z.clone().requires_grad_(), z.clone().requires_grad_()
    (compiled(found) * 2).backward()
    (step(expected) * 2).backward()
    torch.testing.assert_close(found.grad, expected.grad)


def test_automatic_choice_compiles() -> None:
    z, target = inputs((4, 6, 3, 2), 5, torch.float32, "cpu")
    compiled = torch.compile(similarity_loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(z, target, 5), composition(z, target, 5))


@column.cases
def test_fake_tensors(device: str, provider: str) -> None:
    with FakeTensorMode():
        z = torch.empty(4, 6, 3, 2, dtype=torch.float16, device=device).requires_grad_()
        z_last = torch.empty_like(z, memory_format=torch.channels_last).requires_grad_()
        vectors = torch.empty(4, 6, dtype=torch.float16, device=device).requires_grad_()
        target = torch.empty(4, dtype=torch.int64, device=device)
        for leaf in (z, z_last, vectors):
            loss = similarity_loss(leaf, target, 5, provider=provider)
            (grad,) = torch.autograd.grad(loss, leaf)
            assert loss.shape == () and loss.dtype == torch.float32
            assert (grad.shape, grad.dtype, grad.stride()) == (leaf.shape, leaf.dtype, leaf.stride())


@column.cases
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(5, 7, 3, 4), (5, 7)], ids=["map", "vectors"])
def test_autocast_changes_nothing(device: str, provider: str, low: torch.dtype, shape: tuple[int, ...]) -> None:
    z, target = inputs(shape, 6, torch.float32, device)
    for leaf in (z.requires_grad_(), z.detach().to(low).requires_grad_()):
        expected = similarity_loss(leaf, target, 6, provider=provider)
        with torch.autocast(device, low):
            found = similarity_loss(leaf, target, 6, provider=provider)
        assert torch.equal(found, expected)
        for a, b in zip(torch.autograd.grad(found, leaf), torch.autograd.grad(expected, leaf), strict=True):
            assert a.dtype == leaf.dtype and torch.equal(a, b)


@column.cases
def test_scaled_loss_does_not_underflow(device: str, provider: str) -> None:
    z, target = inputs((6, 4, 32, 32), 5, torch.float16, device)
    z.requires_grad_()
    (similarity_loss(z, target, 5, provider=provider) * 65536).backward()
    exact = z.detach().double().requires_grad_()
    (composition(exact, target, 5) * 65536).backward()
    column.assert_close("z", z.grad, exact.grad.half(), exact.grad)
    # The same gradient, unscaled, is mostly below what float16 can hold with its digits.
    assert ((exact.grad / 65536).abs() < 6e-5).float().mean() > 0.5


@column.cases
def test_differentiable_once(device: str, provider: str) -> None:
    z, target = inputs((4, 6, 3, 2), 5, torch.float32, device)
    z.requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(similarity_loss(z, target, 5, provider=provider), z, create_graph=True)
    loss = similarity_loss(z, target, 5, provider=provider)
    first = torch.autograd.grad(loss, z, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(loss, z)[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"z": torch.zeros(4)}, ValueError, r"expected z of shape \(N, C\)"),
        ({"z": torch.zeros(0, 6, 3, 2)}, ValueError, "at least one image"),
        ({"z": torch.zeros(4, 6, 0)}, ValueError, "at least one image"),
        ({"z": torch.zeros(4, 6, 1, 1)}, ValueError, r"at least two positions.*z\.flatten\(1\)"),
        ({"z": torch.zeros(4, 6, dtype=torch.int32)}, TypeError, "expected z in float16"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, "expected 4 labels"),
        ({"target": torch.zeros(4, 5, dtype=torch.int64)}, ValueError, r"labels of shape \(N,\)"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, TypeError, r"target\.long\(\)"),
        ({"target": torch.tensor([0, 1, 7, 2])}, ValueError, "label 7 at index 2"),
        ({"target": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "expected target on cpu"),
        ({"num_classes": 0}, ValueError, "num_classes of at least 1"),
        ({"provider": "metal"}, ValueError, "has no provider 'metal'"),
        ({"provider": "cuda"}, (ValueError, RuntimeError), "cuda"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_use_is_explained(changes: dict, error: type[Exception], message: str) -> None:
    z, target = inputs((4, 6, 3, 2), 5, torch.float32, "cpu")
    arguments = {"z": z, "target": target, "num_classes": 5, **changes}
    positional = [arguments.pop(name) for name in ("z", "target", "num_classes")]
    with pytest.raises(error, match=message):
        similarity_loss(*positional, **arguments)


@column.gpu_cases
def test_side_stream(device: str, provider: str) -> None:
    z, target = inputs((64, 128, 32, 32), 10, torch.float32, device)

    def run(z: Tensor) -> list[Tensor]:
        leaf = z.detach().requires_grad_()
        loss = similarity_loss(leaf, target, 10, provider=provider, check_labels=False)
        return [loss.detach(), *torch.autograd.grad(loss, leaf)]

    column.assert_follows_the_stream(run, z)


@column.gpu_cases
def test_graph_capture(device: str, provider: str) -> None:
    z, target = inputs((16, 32, 8, 8), 10, torch.float32, device)
    z.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = similarity_loss(z, target, 10, provider=provider)
        return (loss, *torch.autograd.grad(loss, z))

    column.assert_replays(step, z)


@column.gpu_cases
def test_second_device(device: str, provider: str) -> None:
    column.assert_runs_beside_the_current_device(
        lambda other: compare(*inputs((5, 7, 3, 4), 6, torch.float32, other), 6, provider)
    )


@pytest.mark.large
@column.gpu_cases
def test_more_than_two_billion_elements(device: str, provider: str) -> None:
    z, target = inputs((33, 64, 1024, 1024), 10, torch.float16, device)
    assert z.numel() > 2**31
    features = torch.stack([image.float().std((1, 2)) for image in z])
    expected = composition(features, target, 10)
    for layout in (z, z.contiguous(memory_format=torch.channels_last)):
        leaf = layout.detach().requires_grad_()
        loss = similarity_loss(leaf, target, 10, provider=provider)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert bool((grad[-2].flatten(1) != 0).any(1).all())
        del grad, leaf, loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_deviation_alone_has_the_gradient_of_the_op(dtype):
    """Replicas gather deviations: the loss of these vectors is the loss of the maps."""
    z = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    z[1, 2] = 0.5  # a constant channel
    y, maps = torch.tensor([0, 1, 0, 2, 1, 0]), [z.clone().requires_grad_() for _ in range(2)]
    losses = similarity_loss(maps[0], y, 3), similarity_loss(channel_std(maps[1]), y, 3)
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(maps[1].grad, maps[0].grad)
    assert maps[1].grad.dtype == dtype and not maps[1].grad[1, 2].any()

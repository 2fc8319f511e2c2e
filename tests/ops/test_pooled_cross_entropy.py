"""pooled_cross_entropy: every provider against F.cross_entropy in float64 and in the same dtype."""

from __future__ import annotations

import itertools

import column
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from auglocal_ext.ops import pooled_cross_entropy

OP = "pooled_cross_entropy"
IGNORE = -100
SHAPES = [
    (5, 7, 3, 4),
    (4, 19, 7, 7),
    (3, 16, 8, 8),
    (2, 130, 6, 5),
    (33, 10),
    (2, 5, 11),
    (1, 1, 1, 1),
    (2, 3, 2, 3, 4),
]


def composition(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **options) -> tuple[Tensor, Tensor]:
    """The three ops of torch that the op stands for: loss and logits."""
    pooled = x.mean(dim=tuple(range(2, x.dim()))) if x.dim() > 2 else x
    logits = F.linear(pooled, weight, bias)
    return F.cross_entropy(logits, target, **options), logits


def inputs(
    shape: tuple[int, ...], classes: int, dtype: torch.dtype, device: str, bias: bool = True, ignored: bool = True
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    x = torch.randn(shape, device=device).to(dtype)
    weight = torch.randn(classes, shape[1], device=device).to(dtype)
    target = torch.randint(classes, shape[:1], device=device)
    if ignored and shape[0] > 1:
        target[::3] = IGNORE
    return x, weight, torch.randn(classes, device=device).to(dtype) if bias else None, target


def leaves(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.detach().requires_grad_() for t in tensors]


def compare(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, provider: str, **options) -> None:
    """Loss, logits, hits and every gradient against the composition in float64 and in the inputs' dtype."""

    def run(function, dtype):
        arguments = leaves(*(None if t is None else t.to(dtype) for t in (x, weight, bias)))
        # .to keeps a view's strides where the dtype stays
        if dtype == x.dtype:
            arguments[0] = x.detach().requires_grad_()
        out = function(*arguments, target)
        # An upstream gradient other than 1, as in a sum of losses.
        return out, torch.autograd.grad(out[0] * 3, [a for a in arguments if a is not None])

    ours, grads = run(lambda *a: pooled_cross_entropy(*a, provider=provider, **options), x.dtype)
    same, same_grads = run(lambda *a: composition(*a, **options), x.dtype)
    oracle, oracle_grads = run(lambda *a: composition(*a, **options), torch.float64)

    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    assert ours.loss.dtype == ours.logits.dtype == wide and ours.correct.dtype == torch.int64
    assert not ours.logits.requires_grad and not ours.correct.requires_grad
    column.assert_close("loss", ours.loss, same[0], oracle[0])
    column.assert_close("logits", ours.logits, same[1], oracle[1])
    ignore_index = options.get("ignore_index", IGNORE)
    hits = (ours.logits.argmax(1) == target) & (target != ignore_index)
    assert int(ours.correct) == int(hits.sum())
    for name, tensor, mine, other, exact in zip(
        ("x", "weight", "bias"), (x, weight, bias), grads, same_grads, oracle_grads, strict=False
    ):
        assert mine.dtype == tensor.dtype
        column.assert_close(f"gradient of {name}", mine, other, exact)


@column.cases
@column.dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_shapes(device: str, provider: str, dtype: torch.dtype, shape: tuple[int, ...], poison: None) -> None:
    compare(*inputs(shape, 6, dtype, device), provider, label_smoothing=0.1)


@column.cases
@column.dtypes
@pytest.mark.parametrize("layout", column.LAYOUTS)
def test_layouts(device: str, provider: str, dtype: torch.dtype, layout: str, poison: None) -> None:
    x, *rest = inputs((4, 24, 4, 8), 33, dtype, device)
    compare(column.LAYOUTS[layout](x), *rest, provider)


@column.cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("shape", [(2, 3, 17, 19), (2, 8, 16, 36), (1, 320, 9, 16), (2, 600, 2, 3)], ids=str)
def test_maps_larger_than_one_pass_of_a_block(
    device: str, provider: str, dtype: torch.dtype, layout: str, shape: tuple[int, ...], poison: None
) -> None:
    x, *rest = inputs(shape, 6, dtype, device, ignored=False)
    compare(column.LAYOUTS[layout](x), *rest, provider)


@column.cases
@pytest.mark.parametrize("channels_last", [False, True])
def test_slice_of_an_aligned_row(device: str, provider: str, channels_last: bool) -> None:
    x, weight, bias, target = inputs((3, 32, 64), 6, torch.float32, device)
    if channels_last:
        compare(x.mT.contiguous().mT[:, :30], weight[:, :30], bias, target, provider)
    else:
        compare(x[..., :62], weight, bias, target, provider)


@column.cases
def test_first_of_equal_logits_is_the_prediction(device: str, provider: str) -> None:
    target = (torch.arange(70, device=device) % 35 - 3).clamp(min=0)
    x, weight = torch.ones(70, 4, device=device), torch.zeros(35, 4, device=device)
    assert int(pooled_cross_entropy(x, weight, None, target, provider=provider).correct) == 8


@column.cases
@pytest.mark.parametrize("classes", [1, 2, 31, 32, 100, 1000])
def test_classes(device: str, provider: str, classes: int, poison: None) -> None:
    compare(*inputs((5, 12, 3, 3), classes, torch.float32, device), provider, label_smoothing=0.2)


@column.cases
@pytest.mark.parametrize(
    ("reduction", "smoothing", "bias", "ignore_index"),
    list(itertools.product(("mean", "sum"), (0.0, 0.1, 1.0), (True, False), (IGNORE, 0))),
)
def test_options(
    device: str, provider: str, reduction: str, smoothing: float, bias: bool, ignore_index: int, poison: None
) -> None:
    x, weight, bias_, target = inputs((7, 5, 2, 3), 4, torch.float32, device, bias, ignored=ignore_index < 0)
    target[0] = ignore_index
    compare(
        *(x, weight, bias_, target, provider),
        **{"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignore_index},
    )


@column.cases
@pytest.mark.parametrize("wanted", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 0, 0)], ids=str)
def test_only_needed_gradients(device: str, provider: str, wanted: tuple[int, ...], poison: None) -> None:
    tensors = inputs((5, 7, 3, 4), 6, torch.float32, device)
    everything = leaves(*tensors[:3])
    full = torch.autograd.grad(pooled_cross_entropy(*everything, tensors[3], provider=provider).loss, everything)
    some = [t.detach().requires_grad_(bool(w)) for t, w in zip(tensors[:3], wanted, strict=True)]
    with Calls() as calls:
        loss = pooled_cross_entropy(*some, tensors[3], provider=provider).loss
    assert calls.needs == [tuple(map(bool, wanted))]
    assert loss.requires_grad == any(wanted)
    if any(wanted):
        loss.backward()
    for tensor, expected, want in zip(some, full, wanted, strict=True):
        assert torch.equal(tensor.grad, expected) if want else tensor.grad is None
    made = column.op(OP, provider)(*some, tensors[3], IGNORE, 0.0, True, *map(bool, wanted))[3:]
    assert [m.numel() > 0 for m in made] == list(map(bool, wanted))


class Calls(TorchDispatchMode):
    """Records which gradients the op is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.needs: list[tuple[bool, ...]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if OP in str(function):
            self.needs.append(tuple(args[7:10]))
        return function(*args, **(kwargs or {}))


@column.cases
def test_no_graph_under_no_grad(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((5, 7, 3, 4), 6, torch.float32, device)
    with Calls() as calls, torch.no_grad():
        out = pooled_cross_entropy(*leaves(x, weight, bias), target, provider=provider)
    assert calls.needs == [(False, False, False)]
    assert out.loss.grad_fn is None


@column.cases
def test_gradient_of_x_is_a_broadcast_of_its_channels(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((4, 6, 16, 16), 5, torch.float16, device)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(pooled_cross_entropy(x, weight, bias, target, provider=provider).loss, x)
    assert grad.stride() == (6, 1, 0, 0)
    assert grad.untyped_storage().nbytes() == 4 * 6 * x.element_size()


@column.cases
def test_bitwise_repeatable(device: str, provider: str) -> None:
    x, weight, bias, target = inputs((70, 33, 5, 5), 40, torch.float32, device)

    def once() -> list[Tensor]:
        arguments = leaves(x, weight, bias)
        out = pooled_cross_entropy(*arguments, target, provider=provider)
        return [out.loss.detach(), out.logits, *torch.autograd.grad(out.loss, arguments)]

    for first, again in zip(once(), once(), strict=True):
        assert torch.equal(first, again)


@column.cases
def test_labels_out_of_range_are_ignored_when_unchecked(device: str, provider: str, poison: None) -> None:
    x, weight, bias, target = inputs((6, 4, 2, 2), 5, torch.float32, device)
    bad = target.clone()
    bad[target == IGNORE] = torch.tensor([5, -1], device=device)
    expected = pooled_cross_entropy(x, weight, bias, target, provider=provider)
    found = pooled_cross_entropy(x, weight, bias, bad, provider=provider, check_labels=False)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.correct, expected.correct)


@column.cases
def test_an_ignored_image_counts_nowhere_whatever_its_features(device: str, provider: str, poison: None) -> None:
    x, weight, bias, target = inputs((6, 4, 2, 2), 5, torch.float32, device)
    bias.requires_grad_()
    options = {"label_smoothing": 0.1, "provider": provider}
    expected = pooled_cross_entropy(x, weight, bias, target, **options).loss
    x[target == IGNORE] = float("nan")
    found = pooled_cross_entropy(x, weight, bias, target, **options).loss
    assert torch.equal(found, expected) and bool(found.isfinite())
    assert torch.equal(*(torch.autograd.grad(loss, bias)[0] for loss in (found, expected)))


def test_ignored_images_leave_no_nan_in_gradients_of_aten() -> None:
    """Whose cases of the tests here are slow."""
    x, weight, bias, target = inputs((6, 4, 2, 2), 5, torch.float32, "cpu")
    arguments = leaves(x, weight, bias)

    def run(target: Tensor) -> tuple[Tensor, ...]:
        loss = pooled_cross_entropy(*arguments, target, label_smoothing=0.1, provider="aten").loss
        return loss.detach(), *torch.autograd.grad(loss, arguments)

    loss, *gradients = run(torch.full_like(target, IGNORE))
    assert loss.isnan() and not any(bool(gradient.any()) for gradient in gradients)
    expected = run(target)
    arguments[0].data[target == IGNORE] = float("nan")
    for place in (0, 1, 3):  # what multiplies the image itself, the weight's gradient, cannot leave it out
        assert torch.equal(run(target)[place], expected[place])


@column.cases
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_all_labels_ignored(device: str, provider: str, smoothing: float, poison: None) -> None:
    x, weight, bias, target = inputs((3, 4, 2, 2), 5, torch.float32, device)
    target.fill_(IGNORE)
    arguments = leaves(x, weight, bias)
    out = pooled_cross_entropy(*arguments, target, label_smoothing=smoothing, provider=provider)
    assert out.loss.isnan() and composition(x, weight, bias, target)[0].isnan() and int(out.correct) == 0
    assert all(torch.equal(g, torch.zeros_like(g)) for g in torch.autograd.grad(out.loss, arguments))
    assert float(pooled_cross_entropy(x, weight, bias, target, reduction="sum", provider=provider).loss) == 0


@column.cases
def test_large_logits_stay_finite(device: str, provider: str, poison: None) -> None:
    x, weight, bias, target = inputs((5, 7, 3, 4), 6, torch.float32, device)
    compare(x * 3000, weight, bias, target, provider, label_smoothing=0.1)

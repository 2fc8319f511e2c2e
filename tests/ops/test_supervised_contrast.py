"""supervised_contrast: every provider against the loss over the whole matrix of pairs, in float64 and in float32."""

from __future__ import annotations

import os
from importlib import import_module

import column
import fence
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext.ops import providers, supervised_contrast
from auglocal_ext.ops.reference.supervised_contrast import ROWS

OP = "supervised_contrast"
IGNORE = -100
SHAPES = [(1, 1), (2, 3), (5, 7), (33, 2), (31, 130)]  # images and features

# What a view of a feature matrix may look like.
LAYOUTS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "feature-slice": lambda x: torch.cat([x, x, x], 1)[:, x.shape[1] : 2 * x.shape[1]],
    "every-second-feature": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "image-slice": lambda x: torch.cat([x, x]).repeat_interleave(2, 0)[1::2][: x.shape[0]],
    "unaligned-start": lambda x: F.pad(x.flatten(), (1, 0))[1:].view(x.shape),
    "expanded-images": lambda x: x[:1].expand_as(x),
    "expanded-features": lambda x: x[:, :1].expand_as(x),
}


def composition(features: Tensor, target: Tensor, temperature: float, ignore_index: int = IGNORE) -> Tensor:
    """The loss by torch's functions and autograd, with the matrix of all pairs."""
    z = F.normalize(features if features.dtype == torch.float64 else features.float(), dim=1)
    counted = target != ignore_index
    left_out = torch.eye(len(z), dtype=torch.bool, device=z.device) | ~counted
    positive = (target[:, None] == target) & counted[:, None] & ~left_out
    logits = (z @ z.t() / temperature).masked_fill(left_out, torch.finfo(z.dtype).min)
    log_probability = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~positive, 0)
    positives = positive.sum(1)
    return -(log_probability.sum(1) / positives.clamp(min=1)).sum() / (positives > 0).sum().clamp(min=1)


def inputs(shape: tuple[int, int], dtype: torch.dtype, device: str, classes: int = 6) -> tuple[Tensor, Tensor]:
    features = torch.randn(shape, device=device).to(dtype)
    target = torch.randint(classes, shape[:1], device=device)
    if shape[0] > 2:
        target[::3] = IGNORE
        target[1] = classes  # nobody else's
    return features, target


def compare(features: Tensor, target: Tensor, provider: str, temperature: float = 0.2, **options) -> None:
    """Loss and gradient against the composition in float64 and in the features' dtype."""

    def run(function, dtype):
        # .to keeps a view's strides where the dtype stays
        leaf = features.detach().to(dtype).requires_grad_()
        loss = function(leaf)
        # An upstream gradient other than 1, as in a sum of losses.
        return loss, torch.autograd.grad(loss * 3, leaf)[0]

    ours, grad = run(
        lambda f: supervised_contrast(f, target, temperature, provider=provider, **options), features.dtype
    )
    same, same_grad = run(lambda f: composition(f, target, temperature, **options), features.dtype)
    oracle, oracle_grad = run(lambda f: composition(f, target, temperature, **options), torch.float64)
    assert ours.dtype == (torch.float64 if features.dtype == torch.float64 else torch.float32)
    assert grad.dtype == features.dtype
    column.assert_close("loss", ours, same, oracle)
    column.assert_close("gradient of features", grad, same_grad, oracle_grad)


@column.cases
@column.dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_shapes(device: str, provider: str, dtype: torch.dtype, shape: tuple[int, int], poison: None) -> None:
    compare(*inputs(shape, dtype, device), provider)


def outcome(features: Tensor, target: Tensor, provider: str) -> list[Tensor]:
    leaf = features.detach().requires_grad_()
    loss = supervised_contrast(leaf, target, 0.1, provider=provider)
    return [loss.detach(), *torch.autograd.grad(loss, leaf)]


@column.cases
@pytest.mark.parametrize("shape", [(ROWS, 5), (ROWS + 1, 300), (2 * ROWS + 77, 20)], ids=str)
def test_several_blocks_of_rows(device: str, provider: str, shape: tuple[int, int], poison: None) -> None:
    if device == "cpu" and provider == "triton":
        pytest.skip("minutes in the interpreter: see test_small_blocks")
    compare(*inputs(shape, torch.float32, device), provider)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("device", "provider"), [case for case in column.CASES if case.values[0] == "cpu"])
def test_no_product_is_read_past_its_last_row(device: str, provider: str) -> None:
    if provider in ("reference", "triton"):
        pytest.skip("plain PyTorch" if provider == "reference" else "minutes in the interpreter")
    features, target = inputs((2 * ROWS + 77, 20), torch.float32, device)
    fence.survives(lambda: compare(features, target, provider))


@pytest.mark.parametrize("provider", ["reference", pytest.param("triton", id="cpu-triton")])
@pytest.mark.parametrize("shape", [(8, 20), (9, 8), (29, 9)], ids=str)
def test_small_blocks(provider: str, shape: tuple[int, int], poison: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module(f"auglocal_ext.ops.{provider}.{OP}")
    for name in ("ROWS", "BLOCK"):
        if hasattr(module, name):
            monkeypatch.setattr(module, name, 8)
    compare(*inputs(shape, torch.float32, "cpu"), provider)


@column.cases
@column.dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_view_is_as_good_as_a_copy(device: str, provider: str, dtype: torch.dtype, layout: str, poison: None) -> None:
    features, target = inputs((12, 24), dtype, device, classes=3)
    view = LAYOUTS[layout](features)
    assert not view.is_contiguous() or view.data_ptr() % 16
    for found, wanted in zip(
        outcome(view, target, provider), outcome(view.contiguous().clone(), target, provider), strict=True
    ):
        assert torch.equal(found, wanted)


@column.cases
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0, 50.0])
def test_temperatures(device: str, provider: str, temperature: float, poison: None) -> None:
    compare(*inputs((40, 9), torch.float32, device), provider, temperature)


@column.cases
@pytest.mark.parametrize("classes", [1, 2, 1000])
def test_classes(device: str, provider: str, classes: int, poison: None) -> None:
    compare(*inputs((50, 11), torch.float32, device, classes), provider)


@column.cases
@pytest.mark.parametrize("ignore_index", [0, 2**40])
def test_any_number_is_a_label(device: str, provider: str, ignore_index: int, poison: None) -> None:
    features, _ = inputs((7, 5), torch.float32, device)
    # 2^40 and 2^40 + 2^33 are equal in float32 and 0 in int32.
    target = torch.tensor([0, -3, 2**40, 2**40 + 2**33, -3, 0, 2**40], device=device)
    compare(features, target, provider, ignore_index=ignore_index)


@column.cases
@pytest.mark.parametrize("target", [[IGNORE] * 4, [3, 1, 2, 0], [1, IGNORE, IGNORE, 2]], ids=str)
def test_without_an_anchor_the_loss_is_zero(device: str, provider: str, target: list[int], poison: None) -> None:
    features = torch.randn(4, 5, device=device, requires_grad=True)
    loss = supervised_contrast(features, torch.tensor(target, device=device), 0.07, provider=provider)
    (grad,) = torch.autograd.grad(loss, features)
    assert float(loss.detach()) == 0 and torch.equal(grad, torch.zeros_like(grad))


@column.cases
def test_ignored_images_change_nothing(device: str, provider: str, poison: None) -> None:
    features, target = inputs((20, 6), torch.float32, device)
    kept = target != IGNORE
    (loss, grad) = outcome(features, target, provider)
    wanted, wanted_grad = outcome(features[kept], target[kept], provider)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(grad[kept], wanted_grad)
    assert not grad[~kept].any()


@column.cases
@pytest.mark.parametrize("size", [0.0, 1e-14, 1e-10, 1e12])
def test_short_and_long_rows(device: str, provider: str, size: float, poison: None) -> None:
    features, target = inputs((10, 4), torch.float32, device, classes=2)
    features[4] = features[4] / features[4].norm() * size
    compare(features, target, provider)


@column.cases
def test_equal_rows(device: str, provider: str, poison: None) -> None:
    _, target = inputs((10, 4), torch.float32, device, classes=2)
    compare(torch.ones(10, 4, device=device), target, provider, 0.01)


@column.cases
def test_nan_is_passed_on(device: str, provider: str) -> None:
    features, target = torch.randn(5, 4, device=device), torch.zeros(5, dtype=torch.int64, device=device)
    features[3, 1] = float("nan")
    features.requires_grad_()
    loss = supervised_contrast(features, target, 0.1, provider=provider)
    assert loss.isnan() and torch.autograd.grad(loss, features)[0].isnan().all()


@column.cases
def test_the_gradient_is_made_where_it_is_needed(device: str, provider: str, poison: None) -> None:
    features, target = inputs((9, 7), torch.float32, device)
    leaf = features.clone().requires_grad_()
    with column.GradientNeeds(OP) as calls:
        without = supervised_contrast(features, target, 0.1, provider=provider)
        loss = supervised_contrast(leaf, target, 0.1, provider=provider)
        with torch.no_grad():
            unrecorded = supervised_contrast(leaf, target, 0.1, provider=provider)
    assert calls.needs == [False, True, False]
    assert not without.requires_grad and loss.requires_grad and unrecorded.grad_fn is None
    assert torch.equal(without, loss.detach()) and torch.equal(without, unrecorded)
    for need in (False, True):
        made = column.op(OP, provider)(features, target, 0.1, IGNORE, need)[1]
        assert made.shape == (features.shape if need else (0,))


@column.cases
def test_inputs_are_not_written(device: str, provider: str) -> None:
    features, target = inputs((20, 6), torch.float32, device)
    before = features.clone(), target.clone()
    supervised_contrast(features.requires_grad_(), target, 0.1, provider=provider).backward()
    assert torch.equal(features.detach(), before[0]) and torch.equal(target, before[1])


@column.cases
def test_bitwise_repeatable(device: str, provider: str) -> None:
    features, target = inputs((20, 33), torch.float32, device)
    for first, again in zip(outcome(features, target, provider), outcome(features, target, provider), strict=True):
        assert torch.equal(first, again)


@column.cases
def test_keeps_one_number_for_each_feature(device: str, provider: str) -> None:
    features, target = inputs((40, 6), torch.float16, device)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        supervised_contrast(features.requires_grad_(), target, 0.1, provider=provider)
    assert [(t.shape, t.dtype, t.untyped_storage().nbytes()) for t in kept] == [((40, 6), torch.float32, 40 * 6 * 4)]


@pytest.mark.parametrize("provider", ["reference", "cpu"])
def test_gradcheck(provider: str) -> None:
    features, target = inputs((9, 4), torch.float64, "cpu", classes=2)
    torch.autograd.gradcheck(
        lambda f: supervised_contrast(f, target, 0.5, provider=provider), features.requires_grad_()
    )


@column.cases
def test_opcheck(device: str, provider: str) -> None:
    features, target = inputs((8, 6), torch.float32, device, classes=2)
    leaf = features.t().contiguous().t().requires_grad_()
    torch.library.opcheck(column.op(OP, provider), (leaf, target, 0.1, IGNORE, True))
    torch.library.opcheck(column.op(OP, provider), (features, target, 0.1, IGNORE, False))


@column.cases
def test_compiles_as_one_graph(device: str, provider: str) -> None:
    features, target = inputs((8, 6), torch.float32, device, classes=2)

    def step(features: Tensor) -> Tensor:
        return supervised_contrast(features * 2, target, 0.1, provider=provider)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    found, expected = features.clone().requires_grad_(), features.clone().requires_grad_()
    loss, wanted = compiled(found), step(expected)
    (loss * 2).backward()
    (wanted * 2).backward()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(found.grad, expected.grad)


def test_automatic_choice_compiles() -> None:
    features, target = inputs((8, 6), torch.float32, "cpu", classes=2)
    compiled = torch.compile(supervised_contrast, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(features, target, 0.1), composition(features, target, 0.1))


@column.cases
def test_fake_tensors(device: str, provider: str) -> None:
    with FakeTensorMode():
        features = torch.empty(6, 4, dtype=torch.float16, device=device).t().requires_grad_()
        target = torch.empty(4, dtype=torch.int64, device=device)
        loss = supervised_contrast(features, target, 0.1, provider=provider)
        (grad,) = torch.autograd.grad(loss, features)
    assert loss.shape == () and loss.dtype == torch.float32
    assert grad.shape == (4, 6) and grad.dtype == torch.float16


@column.cases
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_rounds_nothing(device: str, provider: str, low: torch.dtype) -> None:
    features, target = inputs((10, 7), torch.float32, device)
    for leaf in (features.clone().requires_grad_(), features.to(low).requires_grad_()):
        with torch.autocast(device, low):
            loss = supervised_contrast(leaf, target, 0.1, provider=provider)
        wanted = supervised_contrast(leaf, target, 0.1, provider=provider)
        assert torch.equal(loss, wanted)
        assert torch.equal(torch.autograd.grad(loss, leaf)[0], torch.autograd.grad(wanted, leaf)[0])


@column.cases
def test_scaled_loss_does_not_underflow(device: str, provider: str) -> None:
    features, target = inputs((30, 6), torch.float16, device)
    leaf, exact = (features * 5000).requires_grad_(), (features * 5000).double().requires_grad_()
    (supervised_contrast(leaf, target, 1.0, provider=provider) * 65536).backward()
    (composition(exact, target, 1.0) * 65536).backward()
    column.assert_close("features", leaf.grad, exact.grad.half(), exact.grad)
    # The same gradient, unscaled, loses most of its digits in what float16 can hold.
    assert ((exact.grad / 65536).half() == 0).float().mean() > (leaf.grad == 0).float().mean()


@column.cases
def test_differentiable_once(device: str, provider: str) -> None:
    features, target = inputs((8, 6), torch.float32, device, classes=2)
    features.requires_grad_()
    with pytest.raises(RuntimeError, match="differentiable once"):
        loss = supervised_contrast(features, target, 0.1, provider=provider)
        torch.autograd.grad(loss, features, create_graph=True)
    loss = supervised_contrast(features, target, 0.1, provider=provider)
    first = torch.autograd.grad(loss, features, retain_graph=True)
    again = torch.autograd.grad(loss, features)
    assert torch.equal(first[0], again[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": torch.zeros(4)}, ValueError, r"expected features of shape \(N, D\).*\(4,\)"),
        ({"features": torch.zeros(4, 6, 1, 1)}, ValueError, "flatten or pool"),
        ({"features": torch.zeros(0, 6)}, ValueError, "at least one image"),
        ({"features": torch.zeros(4, 6, dtype=torch.int32)}, TypeError, "expected features in float16"),
        ({"target": torch.zeros(3, dtype=torch.int64)}, ValueError, "expected 4 labels"),
        ({"target": torch.zeros(4, 5, dtype=torch.int64)}, ValueError, r"labels of shape \(N,\)"),
        ({"target": torch.zeros(4, dtype=torch.int32)}, TypeError, r"target\.long\(\)"),
        ({"target": torch.zeros(4, dtype=torch.int64, device="meta")}, ValueError, "expected target on cpu"),
        ({"temperature": 0.0}, ValueError, "positive, finite temperature, got 0.0"),
        ({"temperature": float("nan")}, ValueError, "positive, finite temperature"),
        ({"provider": "metal"}, ValueError, "has no provider 'metal'"),
        ({"provider": "cuda"}, (ValueError, RuntimeError), "cuda"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_use_is_explained(changes: dict, error: type[Exception], message: str) -> None:
    target = torch.zeros(4, dtype=torch.int64)
    arguments = {"features": torch.zeros(4, 6), "target": target, "temperature": 0.1, **changes}
    with pytest.raises(error, match=message):
        supervised_contrast(**arguments)


@column.gpu_cases
def test_side_stream(device: str, provider: str) -> None:
    features, target = inputs((1024, 128), torch.float32, device)

    def run(features: Tensor) -> list[Tensor]:
        return [supervised_contrast(features, target, 0.1, provider=provider)]

    column.assert_follows_the_stream(run, features)


@column.gpu_cases
def test_graph_capture(device: str, provider: str) -> None:
    features, target = inputs((ROWS + 44, 32), torch.float32, device)
    features.requires_grad_()

    def step() -> tuple[Tensor, ...]:
        loss = supervised_contrast(features, target, 0.1, provider=provider)
        return loss, *torch.autograd.grad(loss, features)

    column.assert_replays(step, features)


@column.gpu_cases
def test_second_device(device: str, provider: str) -> None:
    column.assert_runs_beside_the_current_device(
        lambda other: compare(*inputs((33, 7), torch.float32, other), provider)
    )


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_compiled_provider_is_there(name: str) -> None:
    column.need(name, name)
    assert providers.available(name)

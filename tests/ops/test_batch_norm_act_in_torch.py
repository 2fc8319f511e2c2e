"""batch_norm_act as an op of torch: autograd, compilation, fake tensors, autocast, running statistics; wrong use."""

from __future__ import annotations

import itertools
from typing import Any

import column
import pytest
import torch
from test_batch_norm_act import composition, inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext.memory import MemoryMeter
from auglocal_ext.ops import (
    batch_norm_act,
    batch_norm_factors,
)

OP = "batch_norm_act"


@pytest.mark.parametrize("provider", ["reference", "cpu"])
@column.activations
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_gradcheck(provider: str, activation: str, training: bool) -> None:
    x, weight, bias, mean, var, residual = inputs((3, 4, 2, 3), torch.float64, "cpu")
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        running = () if training else (mean, var)
        return batch_norm_act(
            *(x, weight, bias, *(running or (None, None))),
            **{"residual": residual, "training": training, "activation": activation, "negative_slope": 0.3},
            provider=provider,
        )

    torch.autograd.gradcheck(function, leaves)


@column.cases
@pytest.mark.parametrize(
    "layout", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("contiguous", "channels-last")), "row-slice"]
)
def test_opcheck(device: str, provider: str, layout: str) -> None:
    x, weight, bias, mean, var, residual = inputs((4, 6, 3, 2), torch.float32, device)
    x = column.LAYOUTS[layout](x)
    grad = torch.randn(4, 6, 1, 1, device=device).expand_as(x)
    factors = (mean, var, weight, bias)
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
    torch.library.opcheck(column.op("batch_norm_stats", provider), (x,))
    batches = torch.tensor(3, device=device)
    factors_ = column.op("batch_norm_factors_", provider)
    torch.library.opcheck(factors_, (x, mean.clone(), var.clone(), batches, 0.1, 1e-5))
    torch.library.opcheck(factors_, (x, None, None, None, 0.1, 1e-5))
    torch.library.opcheck(column.op("batch_norm_act_apply", provider), (x, *factors, None, 0.0))
    torch.library.opcheck(column.op("batch_norm_act_reduce", provider), (grad, x, *factors, residual, 0.2))
    gradient = column.op("batch_norm_act_input_grad", provider)
    torch.library.opcheck(gradient, (grad, x, *factors, residual, 0.2, mean, var, True))
    torch.library.opcheck(gradient, (grad, x, mean, var, None, None, None, 1.0, None, None, False))
    forward_ = column.op("batch_norm_act_forward_", provider)
    written = (mean.clone(), var.clone(), batches)
    torch.library.opcheck(forward_, (x, *written, weight, bias, residual, 0.1, 1e-5, 0.2))
    torch.library.opcheck(forward_, (x, *(None,) * 6, 0.1, 1e-5, 1.0))
    backward = column.op("batch_norm_act_backward", provider)
    for needs in itertools.product((True, False), repeat=4):
        torch.library.opcheck(backward, (grad, x, *factors, residual, 0.2, *needs), test_utils="test_faketensor")
    torch.library.opcheck(backward, (grad, x, *factors, residual, 0.2, True, True, True, True))
    for slope, training in ((0.0, True), (1.0, False)):
        arguments = (leaves[0], mean, var, *leaves[1:], slope, training)
        torch.library.opcheck(column.op(OP, provider), arguments)


@column.cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("slope", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "no-residual"])
def test_ops_of_several_passes_are_their_passes(
    device: str, provider: str, dtype: torch.dtype, layout: str, slope: float, with_residual: bool, poison: None
) -> None:
    """To the bit, and what is not needed has no elements."""
    x, weight, bias, *running, residual = inputs((5, 6, 3, 4), dtype, device)
    weight, bias, *running = (vector.float() for vector in (weight, bias, *running))
    x, added = column.LAYOUTS[layout](x), residual if with_residual else None
    grad, batches = torch.randn_like(x), torch.tensor(3, device=device)
    names = ("factors_", "act_apply", "act_forward_", "act_reduce", "act_input_grad", "act_backward")
    factors_, apply, forward_, reduce, input_grad, backward = (column.op(f"batch_norm_{n}", provider) for n in names)
    whole, apart = ([tensor.clone() for tensor in (*running, batches)] for _ in range(2))
    y, mean, rstd = forward_(x, *whole, weight, bias, added, 0.1, 1e-5, slope)
    expected = factors_(x, *apart, 0.1, 1e-5)
    tensors = (grad, x, mean, rstd, weight, bias, added, slope)
    made = apply(*tensors[1:])
    assert y.stride() == x.stride()
    assert all(torch.equal(*pair) for pair in zip((y, mean, rstd, *whole), (made, *expected, *apart), strict=True))
    sums = reduce(*tensors)
    for training, need_x, need_vectors, need_residual in itertools.product((True, False), repeat=4):
        found = backward(*tensors, training, need_x, need_vectors, need_residual)
        through, none = training and need_x, [x.new_empty(0)] * 2
        maps = input_grad(*tensors, *(sums if through else (None, None)), need_residual)
        wanted = [*(maps if need_x or need_residual else none), *(sums if through or need_vectors else none)]
        for index, pair in enumerate(zip(found, wanted, strict=True)):
            assert pair[0].dtype == (x.dtype if index < 2 else torch.float32)
            assert torch.equal(pair[0], pair[1].to(pair[0].dtype))


@column.cases
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compiles_as_one_graph(device: str, provider: str, training: bool) -> None:
    x, weight, bias, mean, var, residual = inputs((4, 6, 3, 2), torch.float32, device)

    def step(leaves: list[Tensor], running: list[Tensor]) -> Tensor:
        x, weight, bias, residual = leaves
        return batch_norm_act(*(x * 2, weight, bias, *running), residual=residual, training=training, provider=provider)

    column.assert_compiles(step, (x, weight, bias, residual), (mean, var))


def test_automatic_choice_compiles() -> None:
    tensors = inputs((4, 6, 3, 2), torch.float32, "cpu")[:5]
    compiled = torch.compile(batch_norm_act, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors, training=True), composition(*tensors, training=True))


@column.cases
def test_fake_tensors(device: str, provider: str) -> None:
    with FakeTensorMode():
        x = torch.empty(4, 6, 3, 2, dtype=torch.float16, device=device).to(memory_format=torch.channels_last)
        x.requires_grad_()
        weight = torch.empty(6, device=device, requires_grad=True)
        residual = torch.empty(4, 6, 3, 2, dtype=torch.float16, device=device, requires_grad=True)
        running = torch.empty(6, device=device), torch.empty(6, device=device)
        y = batch_norm_act(x, weight, None, *running, residual=residual, training=True, provider=provider)
        grads = torch.autograd.grad(y.sum(), (x, weight, residual))
    assert y.shape == x.shape and y.dtype == x.dtype and y.stride() == x.stride()
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in (x, weight, residual)]
    assert grads[0].stride() == x.stride()


@column.cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_bitwise_repeatable(device: str, provider: str, layout: str) -> None:
    x, weight, bias, mean, var, residual = inputs((70, 33, 5, 5), torch.float32, device)
    x, grad = column.LAYOUTS[layout](x), torch.randn(x.shape, device=device)

    def step(leaves: list[Tensor], running: list[Tensor]) -> Tensor:
        x, weight, bias, residual = leaves
        return batch_norm_act(x, weight, bias, *running, residual=residual, training=True, provider=provider)

    column.assert_repeatable(step, (x, weight, bias, residual), (mean, var), grad)


@column.cases
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_saves_the_input_and_vectors_alone(device: str, provider: str, activation: str) -> None:
    x, weight, bias, mean, var, residual = inputs((8, 6, 16, 16), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), MemoryMeter() as meter:
        meter.track(leaves, mean, var)
        before = meter.live_bytes
        y = batch_norm_act(
            *(leaves[0], weight, bias, mean, var),
            **{"residual": residual, "training": True, "activation": activation, "provider": provider},
        )
        held = meter.live_bytes - before
    kept = {x.data_ptr(), residual.data_ptr()} if activation == "relu" else {x.data_ptr()}
    assert {t.data_ptr() for t in saved if t.numel() > 6} == kept
    assert held <= y.numel() * y.element_size() + 6 * 512
    (y * 1).sum().backward()


@column.cases
def test_differentiable_once(device: str, provider: str) -> None:
    x, weight, bias, mean, var, _ = inputs((4, 6, 3, 2), torch.float32, device)
    x.requires_grad_()
    y = batch_norm_act(x, weight, bias, mean, var, training=True, provider=provider)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@column.cases
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_changes_nothing(device: str, provider: str, low: torch.dtype) -> None:
    x, weight, bias, mean, var, residual = inputs((5, 7, 3, 4), low, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def run() -> list[Tensor]:
        y = batch_norm_act(*leaves[:3], mean.clone(), var.clone(), residual=leaves[3], training=True, provider=provider)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    expected = run()
    with torch.autocast(device, low):
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@column.cases
def test_factors_without_running_statistics_touch_nothing(device: str, provider: str) -> None:
    x, _, _, mean, var, _ = inputs((4, 6, 3, 2), torch.float32, device)
    kept = mean.clone(), var.clone()
    updated = batch_norm_factors(x, mean, var, training=True, provider=provider)
    again = batch_norm_factors(x, None, None, training=True, provider=provider)
    assert all(torch.equal(a, b) for a, b in zip(updated, again, strict=True))
    assert not torch.equal(mean, kept[0]) and not torch.equal(var, kept[1])
    constant = batch_norm_factors(x, mean, var, training=False, eps=0.5, provider=provider)
    torch.testing.assert_close(constant, (mean, 1 / (var + 0.5).sqrt()))


@column.cases
@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [torch.int64, torch.int32], ids=str)
def test_batches_are_counted(device: str, provider: str, kind: torch.dtype, low: bool) -> None:
    x, _, _, mean, var, _ = inputs((4, 70, 3, 2), torch.bfloat16 if low else torch.float32, device)
    mean, var = (tensor.to(x.dtype) for tensor in (mean, var))  # low: statistics that the op itself does not update
    batches = torch.tensor(2**31 + 5 if kind == torch.int64 else 5, dtype=kind, device=device)
    expected, version = int(batches), batches._version
    for training in (True, False, True):
        y = batch_norm_act(x, None, None, mean, var, num_batches_tracked=batches, training=training, provider=provider)
        expected += training
        assert y.isfinite().all() and int(batches) == expected and batches.dtype == kind
    assert batches._version > version


@column.cases
def test_running_statistics_that_backward_needs_must_not_change(device: str, provider: str) -> None:
    x, weight, bias, mean, var, _ = inputs((4, 6, 3, 2), torch.float32, device)
    y = batch_norm_act(x.requires_grad_(), weight, bias, mean, var, training=False, provider=provider)
    batch_norm_factors(x, mean, var, training=True, provider=provider)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def _with(**changes: Any) -> dict[str, Any]:
    names = ("x", "weight", "bias", "running_mean", "running_var", "residual")
    return dict(zip(names, inputs((4, 6, 3, 2), torch.float32, "cpu"), strict=True)) | {"training": True} | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(4)}, ValueError, r"expected x of shape \(N, C\)"),
        ({"x": torch.zeros(0, 6, 3, 2)}, ValueError, r"at least one image.*got \(0, 6, 3, 2\)"),
        ({"x": torch.zeros(4, 6, 0)}, ValueError, "at least one image"),
        ({"x": torch.zeros(4, 6, 3, 2, dtype=torch.int32)}, TypeError, "expected x in float16"),
        ({"weight": torch.zeros(5)}, ValueError, r"expected weight of shape \(6,\).*\(5,\)"),
        ({"bias": torch.zeros(6, 1)}, ValueError, r"expected bias of shape \(6,\)"),
        ({"running_var": torch.zeros(7)}, ValueError, "expected running_var"),
        ({"weight": torch.zeros(6, dtype=torch.float16)}, TypeError, "expected weight in torch.float32"),
        ({"residual": torch.zeros(4, 6, 2, 3)}, ValueError, r"expected residual \(4, 6, 3, 2\)"),
        ({"residual": torch.zeros(4, 6, 3, 2).half()}, TypeError, "expected residual .* in torch.float32 as x"),
        ({"bias": torch.zeros(6, device="meta")}, ValueError, "expected bias on cpu"),
        ({"running_mean": None, "training": False}, ValueError, "expected running_mean and running_var"),
        ({"activation": "gelu"}, ValueError, "expected activation 'relu', 'leaky_relu', 'none', got 'gelu'"),
        ({"provider": "metal"}, ValueError, "has no provider 'metal'"),
        ({"provider": "cuda"}, (ValueError, RuntimeError), "cuda"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_use_is_explained(changes: dict, error: type[Exception], message: str) -> None:
    arguments = _with(**changes)
    positional = [arguments.pop(name) for name in ("x", "weight", "bias", "running_mean", "running_var")]
    with pytest.raises(error, match=message):
        batch_norm_act(*positional, **arguments)

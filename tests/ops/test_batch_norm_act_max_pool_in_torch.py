"""batch_norm_act_max_pool as an op of torch: compilation, fake tensors, autocast, wrong use; streams and graphs."""

from __future__ import annotations

import itertools

import column
import pytest
import torch
import torch.nn.functional as F
from test_batch_norm_act_max_pool import compare, composition, inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext.memory import MemoryMeter
from auglocal_ext.ops import (
    batch_norm_act,
    batch_norm_act_apply,
    batch_norm_act_max_pool,
    batch_norm_act_max_pool_apply,
    batch_norm_act_max_pool_reduce,
    batch_norm_factors,
)

OP = "batch_norm_act_max_pool"


@column.cases
@pytest.mark.parametrize(
    "layout", [*(pytest.param(each, marks=pytest.mark.slow) for each in ("contiguous", "channels-last")), "row-slice"]
)
def test_opcheck(device: str, provider: str, layout: str) -> None:
    x, weight, bias, mean, var = inputs((2, 6, 5, 4), torch.float32, device)
    x = column.LAYOUTS[layout](x)
    window, factors = (3, 3, 2, 2, 1, 1), (x, mean, var, weight, bias)
    torch.library.opcheck(column.op(f"{OP}_apply", provider), (*factors, 0.0, *window))
    _, indices = column.op(f"{OP}_apply", provider)(*factors, 0.2, *window)
    grad = torch.randn(2, 6, 3, 2, device=device)
    torch.library.opcheck(column.op(f"{OP}_reduce", provider), (grad, indices, *factors, 0.2, *window))
    torch.library.opcheck(column.op(f"{OP}_input_grad", provider), (grad, indices, *factors, 0.2, mean, var, *window))
    bare = (x, mean, var, None, None)
    torch.library.opcheck(column.op(f"{OP}_input_grad", provider), (grad, indices, *bare, 1.0, None, None, *window))
    written = mean.clone(), var.clone(), torch.tensor(3, device=device)
    for others in ((*written, weight, bias, 0.1, 1e-5, 0.2), (None,) * 5 + (0.1, 1e-5, 1.0)):
        torch.library.opcheck(column.op(f"{OP}_forward_", provider), (x, *others, *window))
    for needs in itertools.product((True, False), repeat=3):
        arguments = (grad, indices, *factors, 0.2, *window, *needs)
        torch.library.opcheck(column.op(f"{OP}_backward", provider), arguments, test_utils="test_faketensor")
    leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
    for slope, training in ((0.0, True), (1.0, False)):
        arguments = (leaves[0], mean, var, *leaves[1:], slope, *window, training)
        torch.library.opcheck(column.op(OP, provider), arguments)


@column.cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_ops_of_several_passes_are_their_passes(
    device: str, provider: str, dtype: torch.dtype, layout: str, poison: None
) -> None:
    """To the bit, and what is not needed has no elements."""
    x, weight, bias, *running = (t.float() for t in inputs((5, 6, 7, 4), dtype, device))
    x, window = column.LAYOUTS[layout](x).to(dtype), (3, 3, 2, 2, 1, 1)
    batches = torch.tensor(3, device=device)
    whole, apart = ([tensor.clone() for tensor in (*running, batches)] for _ in range(2))
    names = ("apply", "forward_", "reduce", "input_grad", "backward")
    apply, forward_, reduce, input_grad, backward = (column.op(f"{OP}_{name}", provider) for name in names)
    y, indices, mean, rstd = forward_(x, *whole, weight, bias, 0.1, 1e-5, 0.1, *window)
    expected = column.op("batch_norm_factors_", provider)(x, *apart, 0.1, 1e-5)
    factors = (x, mean, rstd, weight, bias, 0.1)
    wanted = (*apply(*factors, *window), *expected, *apart)
    assert all(map(torch.equal, (y, indices, mean, rstd, *whole), wanted))
    rest = (torch.randn_like(y), indices, *factors)
    sums = reduce(*rest, *window)
    for training, need_x, need_vectors in itertools.product((True, False), repeat=3):
        found, through = backward(*rest, *window, training, need_x, need_vectors), training and need_x
        grad_x = input_grad(*rest, *(sums if through else (None, None)), *window) if need_x else x.new_empty(0)
        made = sums if through or need_vectors else [mean.new_empty(0)] * 2
        assert found[0].dtype == x.dtype and found[0].stride() == grad_x.stride()
        assert all(map(torch.equal, found, (grad_x, *made)))


@column.cases
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compiles_as_one_graph(device: str, provider: str, training: bool) -> None:
    x, weight, bias, mean, var = inputs((2, 6, 5, 4), torch.float32, device)

    def step(leaves: list[Tensor], running: list[Tensor]) -> Tensor:
        x, weight, bias = leaves
        return batch_norm_act_max_pool(x * 2, weight, bias, *running, training=training, provider=provider)

    column.assert_compiles(step, (x, weight, bias), (mean, var))


def test_automatic_choice_compiles() -> None:
    tensors = inputs((2, 6, 5, 4), torch.float32, "cpu")
    compiled = torch.compile(batch_norm_act_max_pool, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*tensors, training=True), composition(*tensors, training=True))


@column.cases
def test_fake_tensors(device: str, provider: str) -> None:
    with FakeTensorMode():
        x = torch.empty(4, 6, 9, 8, dtype=torch.float16, device=device).to(memory_format=torch.channels_last)
        x.requires_grad_()
        weight = torch.empty(6, device=device, requires_grad=True)
        running = torch.empty(6, device=device), torch.empty(6, device=device)
        y = batch_norm_act_max_pool(x, weight, None, *running, training=True, provider=provider)
        grads = torch.autograd.grad(y.sum(), (x, weight))
    assert y.shape == (4, 6, 5, 4) and y.dtype == x.dtype and y.stride(1) == 1
    assert [(g.shape, g.dtype, g.stride()) for g in grads] == [(t.shape, t.dtype, t.stride()) for t in (x, weight)]


@column.cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_bitwise_repeatable(device: str, provider: str, layout: str) -> None:
    images = 70 if device == "cuda" else 5
    x, weight, bias, mean, var = inputs((images, 33, 7, 8), torch.float32, device)
    x, grad = column.LAYOUTS[layout](x), torch.randn(images, 33, 4, 4, device=device)

    def step(leaves: list[Tensor], running: list[Tensor]) -> Tensor:
        return batch_norm_act_max_pool(*leaves, *running, training=True, provider=provider)

    column.assert_repeatable(step, (x, weight, bias), (mean, var), grad)


@column.cases
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_saves_the_input_bytes_and_vectors_alone(device: str, provider: str, activation: str) -> None:
    x, weight, bias, mean, var = inputs((4, 6, 32, 32), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), MemoryMeter() as meter:
        meter.track(leaves, mean, var)
        before = meter.live_bytes
        y = batch_norm_act_max_pool(*leaves, mean, var, training=True, activation=activation, provider=provider)
        held = meter.live_bytes - before
    large = [tensor for tensor in saved if tensor.numel() > 6]
    assert {(t.shape, t.dtype) for t in large} == {(x.shape, x.dtype), (y.shape, torch.uint8)}
    assert x.data_ptr() in {t.data_ptr() for t in large}
    # y itself, a byte for each of its elements, mean and rstd; the meter counts in pages of 512 bytes
    assert held == y.numel() * 4 + y.numel() + 2 * 512
    y.sum().backward()


@column.cases
def test_differentiable_once(device: str, provider: str) -> None:
    x, *vectors = inputs((2, 6, 5, 4), torch.float32, device)
    x.requires_grad_()
    y = batch_norm_act_max_pool(x, *vectors, training=True, provider=provider)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


@column.cases
@pytest.mark.parametrize("low", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_autocast_changes_nothing(device: str, provider: str, low: torch.dtype) -> None:
    x, weight, bias, mean, var = inputs((3, 7, 6, 4), low, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def run() -> list[Tensor]:
        y = batch_norm_act_max_pool(*leaves, mean.clone(), var.clone(), training=True, provider=provider)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    expected = run()
    with torch.autocast(device, low):
        found = run()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.zeros(4, 6)}, ValueError, r"expected x of shape \(N, C, H, W\), got \(4, 6\)"),
        ({"x": torch.zeros(0, 6, 5, 4)}, ValueError, "at least one image"),
        ({"x": torch.zeros(2, 6, 5, 4, dtype=torch.int32)}, TypeError, "expected x in float16"),
        ({"weight": torch.zeros(5)}, ValueError, r"expected weight of shape \(6,\).*\(5,\)"),
        ({"kernel_size": 17}, ValueError, "a window of at most 256 elements.*batch_norm_act and F.max_pool2d"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "expected kernel_size of at least 1, one number or"),
        ({"kernel_size": 0}, ValueError, "expected kernel_size of at least 1"),
        ({"stride": 0}, ValueError, "expected stride of at least 1"),
        ({"padding": 2}, ValueError, r"padding of at most half of kernel_size \(3, 3\), got \(2, 2\)"),
        ({"kernel_size": 7}, ValueError, r"no smaller than kernel_size \(7, 7\)"),
        ({"activation": "gelu"}, ValueError, "expected activation 'relu', 'leaky_relu', 'none', got 'gelu'"),
        ({"provider": "metal"}, ValueError, "has no provider 'metal'"),
        ({"provider": "cuda"}, (ValueError, RuntimeError), "cuda"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_use_is_explained(changes: dict, error: type[Exception], message: str) -> None:
    names = ("x", "weight", "bias", "running_mean", "running_var")
    arguments = dict(zip(names, inputs((2, 6, 4, 4), torch.float32, "cpu"), strict=True)) | {"training": True} | changes
    positional = [arguments.pop(name) for name in names]
    with pytest.raises(error, match=message):
        batch_norm_act_max_pool(*positional, **arguments)


def test_primitives_check_what_forward_returned() -> None:
    x, weight, bias, mean, var = inputs((2, 6, 5, 4), torch.float32, "cpu")
    y, indices = batch_norm_act_max_pool_apply(x, mean, var, weight, bias)
    for grad, places in ((y.half(), indices), (y[:, :, 1:], indices), (y, indices.long())):
        with pytest.raises(ValueError, match=r"expected (grad|indices) \(2, 6, 3, 2\) in"):
            batch_norm_act_max_pool_reduce(grad, places, x, mean, var, weight, bias)


@column.gpu_cases
def test_side_stream(device: str, provider: str) -> None:
    x, *vectors = inputs((32, 64, 56, 56), torch.float32, device)
    column.assert_follows_the_stream(
        lambda x: [batch_norm_act_max_pool(x, *vectors, training=True, provider=provider)], x
    )


@column.gpu_cases
def test_graph_capture(device: str, provider: str) -> None:
    x, weight, bias, mean, var = inputs((8, 16, 16, 16), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    grad = torch.randn(8, 16, 8, 8, device=device)

    def step() -> tuple[Tensor, ...]:
        y = batch_norm_act_max_pool(*leaves, None, None, training=True, provider=provider)
        return (y, *torch.autograd.grad(y, leaves, grad))

    column.assert_replays(step, x)


@column.gpu_cases
def test_second_device(device: str, provider: str) -> None:
    column.assert_runs_beside_the_current_device(
        lambda other: compare(*inputs((3, 8, 7, 6), torch.float32, other), provider, training=True)
    )


@pytest.mark.large
@column.gpu_cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_more_than_two_billion_elements(device: str, provider: str, layout: str) -> None:
    if provider == "reference":
        pytest.skip("makes maps of int64")
    x = torch.randn(33, 64, 1024, 1024, device=device, dtype=torch.float16)
    assert x.numel() > 2**31
    x = column.LAYOUTS[layout](x).requires_grad_()
    y = batch_norm_act_max_pool(x, None, None, None, None, training=True, provider=provider)
    (grad_x,) = torch.autograd.grad(y, x, torch.ones_like(y))
    mean, rstd = batch_norm_factors(x.detach(), None, None, training=True, provider=provider)
    with torch.no_grad():
        for image in (0, 32):
            z = batch_norm_act_apply(x[image : image + 1], mean, rstd, None, None, None, provider=provider)
            assert torch.equal(y[image : image + 1], F.max_pool2d(z, 3, 2, 1))
    assert grad_x.isfinite().all()


def test_equals_the_ops_one_after_the_other() -> None:
    x, *vectors = inputs((2, 8, 9, 10), torch.float32, "cpu")
    expected = F.max_pool2d(batch_norm_act(x, *vectors, training=True), 3, 2, 1)
    assert torch.equal(batch_norm_act_max_pool(x, *vectors, training=True), expected)

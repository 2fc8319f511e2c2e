"""batch_norm_act_max_pool: every provider against F.max_pool2d of the activated F.batch_norm, wide and alike."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import column
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from auglocal_ext.ops import (
    batch_norm_act_apply,
    batch_norm_act_max_pool,
    batch_norm_act_max_pool_apply,
    batch_norm_act_max_pool_input_grad,
    batch_norm_act_max_pool_reduce,
)
from auglocal_ext.ops.layout import empty_like

OP = "batch_norm_act_max_pool"
# kernel, stride, padding: of the stem, without overlap, with gaps, of differing sides, and wider than a map
WINDOWS = [
    (3, 2, 1),
    (2, 2, 0),
    (3, 1, 1),
    (2, 1, 1),
    (3, 3, 0),
    (2, 3, 1),
    ((3, 2), (1, 2), (0, 1)),
    (1, 1, 0),
    (5, 1, 2),
    (16, 3, 8),
]

windows = pytest.mark.parametrize(("kernel_size", "stride", "padding"), WINDOWS, ids=str)


def composition(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    kernel_size: Any = 3,
    stride: Any = 2,
    padding: Any = 1,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """The ops of torch that the op stands for."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if activation != "none":
        y = F.relu(y) if activation == "relu" else F.leaky_relu(y, negative_slope)
    return F.max_pool2d(y, kernel_size, stride, padding)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, parameters: torch.dtype | None = None) -> list:
    """x, weight, bias, running mean, running variance; the vectors in float32 where x is in less.

    The values of x within one 5x5 window lie so far apart that rounding does not change which is the largest: they
    are drawn without repetition from 25 levels, which a plane repeats every 5 rows and columns.
    """
    if parameters is None:
        parameters = torch.float64 if dtype == torch.float64 else torch.float32
    images, channels, height, width = shape
    vectors = [torch.randn(channels, device=device) for _ in range(3)] + [torch.rand(channels, device=device) + 0.5]
    levels = torch.rand(images, channels, 25, device=device).argsort(-1).unflatten(-1, (5, 5)) * 0.25 - 2.5
    x = levels.tile(height // 5 + 1, width // 5 + 1)[:, :, :height, :width]
    x = x + 0.06 * torch.rand(shape, device=device)
    return [x.to(dtype), *(v.to(parameters) for v in vectors)]


def distinct(shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    """float32 values no two of which are equal, for windows of any size."""
    return (torch.randperm(torch.Size(shape).numel(), device=device).float() * 1e-2).view(shape)


def compare(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    provider: str,
    change: Callable[[Tensor], Tensor] = lambda grad: grad,
    **options: Any,
) -> None:
    """Result, running statistics and every gradient against the composition in float64 and in the inputs' dtype."""
    window = {name: options[name] for name in ("kernel_size", "stride", "padding") if name in options}
    shape = composition(x.double(), None, None, None, None, **window, training=True).shape
    grad = change(torch.randn(shape, device=x.device).to(x.dtype))

    def run(function: Callable[..., Tensor], wide: bool = False) -> list[Tensor]:
        def new(tensor: Tensor | None) -> Tensor | None:
            # detach keeps the strides
            return None if tensor is None else (tensor.double() if wide else tensor).detach().requires_grad_()

        leaves = [new(tensor) for tensor in (x, weight, bias)]
        running = [None if r is None else (r.double() if wide else r.clone()) for r in (running_mean, running_var)]
        y = function(*leaves, *running, **options)
        wanted = [leaf for leaf in leaves if leaf is not None]
        grads = torch.autograd.grad(y, wanted, grad.to(y.dtype))
        assert [g.dtype for g in grads] == [leaf.dtype for leaf in wanted]
        return [y.detach(), *(r for r in running if r is not None), *grads]

    ours = run(lambda *a, **o: batch_norm_act_max_pool(*a, **o, provider=provider))
    named = zip(("running_mean", "running_var"), (running_mean, running_var), strict=True)
    names = ["y", *(name for name, r in named if r is not None), "gradient of x"]
    names += [f"gradient of {n}" for n, t in (("weight", weight), ("bias", bias)) if t is not None]
    same, oracle = run(composition), run(composition, wide=True)
    for name, mine, other, exact in zip(names, ours, same, oracle, strict=True):
        column.assert_close(name, mine, other, exact)


@column.cases
@column.dtypes
@pytest.mark.parametrize(
    "shape",
    [(3, 7, 9, 6), (2, 8, 8, 16), (1, 1, 4, 3), (12, 24, 3, 2)],
    ids=lambda s: "x".join(map(str, s)),
)
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_shapes(
    device: str, provider: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str, poison: None
) -> None:
    x, *vectors = inputs(shape, dtype, device)
    compare(column.LAYOUTS[layout](x), *vectors, provider, training=True)


@column.cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@windows
def test_windows(
    device: str,
    provider: str,
    kernel_size: Any,
    stride: Any,
    padding: Any,
    layout: str,
    poison: None,
) -> None:
    if kernel_size == 16 and provider == "triton" and device == "cpu":
        pytest.skip("256 loads for each element take long in the interpreter")
    shape = (2, 8, 11, 36)
    _, *vectors = inputs(shape, torch.float32, device)
    x = column.LAYOUTS[layout](distinct(shape, device))
    compare(x, *vectors, provider, training=True, kernel_size=kernel_size, stride=stride, padding=padding)


@column.cases
@column.dtypes
@pytest.mark.parametrize("layout", column.LAYOUTS)
def test_layouts(device: str, provider: str, dtype: torch.dtype, layout: str, poison: None) -> None:
    x, *vectors = inputs((4, 24, 4, 8), dtype, device)
    x = column.LAYOUTS[layout](x)
    # Where a window has several of the same values, rounding chooses which of them gets the gradient.
    if layout != "expanded-positions":
        compare(x, *vectors, provider, training=True)
    y = batch_norm_act_max_pool(x, *vectors, training=True, provider=provider)
    assert y.is_contiguous(
        memory_format=torch.channels_last if empty_like(x).stride(1) == 1 else torch.contiguous_format
    )


@column.cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("x_layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "other",
    ["channels-last", "channel-slice", "expanded-positions", "expanded-images", "transposed", "unaligned-start"],
)
def test_layouts_of_the_gradient(
    device: str, provider: str, dtype: torch.dtype, x_layout: str, other: str, poison: None
) -> None:
    x, *vectors = inputs((3, 8, 8, 8), dtype, device)
    compare(column.LAYOUTS[x_layout](x), *vectors, provider, column.LAYOUTS[other], training=True)


@column.cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_offsets_beyond_32_bits(device: str, provider: str, layout: str) -> None:
    x, *vectors = inputs((2, 8, 6, 8), torch.float16, device)
    try:
        memory = torch.empty(2**31 + x[0].numel(), dtype=torch.float16, device=device)  # most of it never touched
    except RuntimeError as error:
        pytest.skip(str(error))
    near = column.LAYOUTS[layout](x)
    far = memory.as_strided(x.shape, (2**31, *near.stride()[1:])).copy_(x)
    compare(far, *vectors, provider, training=True)


@column.cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_vectors_that_begin_anywhere(device: str, provider: str, layout: str, poison: None) -> None:
    x, *vectors = inputs((2, 16, 6, 8), torch.float32, device)
    views = [torch.cat([vector[:1], vector])[1:] for vector in vectors]
    assert all(view.data_ptr() % 16 for view in views)
    for training in (True, False):
        compare(column.LAYOUTS[layout](x), *views, provider, training=training)


@column.cases
@column.activations
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_options(device: str, provider: str, activation: str, training: bool, poison: None) -> None:
    tensors = inputs((3, 6, 7, 6), torch.float32, device)
    options = {"training": training, "activation": activation, "negative_slope": 0.2}
    compare(*tensors, provider, **options)
    compare(*tensors, provider, **options, momentum=0.7, eps=0.3)


@column.cases
@pytest.mark.parametrize(("affine", "tracked"), list(itertools.product((True, False), repeat=2)))
def test_without_weights_or_running_statistics(device: str, provider: str, affine: bool, tracked: bool) -> None:
    x, weight, bias, mean, var = inputs((3, 6, 7, 6), torch.float32, device)
    parameters, running = (weight, bias) if affine else (None, None), (mean, var) if tracked else (None, None)
    compare(x, *parameters, *running, provider, training=True)
    if tracked:
        compare(x, *parameters, *running, provider, training=False)
    if affine:
        compare(x, weight, None, *running, provider, training=True)


@column.cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_parameters_in_the_dtype_of_the_map(device: str, provider: str, dtype: torch.dtype) -> None:
    x, *vectors = inputs((3, 6, 7, 6), dtype, device, parameters=dtype)
    compare(x, *vectors, provider, training=True)


@column.cases
def test_each_input_alone_requires_grad(device: str, provider: str) -> None:
    x, weight, bias, mean, var = inputs((3, 6, 7, 6), torch.float32, device)
    grad = torch.randn(3, 6, 4, 3, device=device)

    def grads(wanted: tuple[int, ...], **options: Any) -> list[Tensor | None]:
        leaves = [t.detach().requires_grad_(bool(w)) for t, w in zip((x, weight, bias), wanted, strict=True)]
        y = batch_norm_act_max_pool(*leaves, mean.clone(), var, provider=provider, **options)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(grad)
        return [leaf.grad for leaf in leaves]

    for training, activation in itertools.product((True, False), ("relu", "none")):
        options = {"training": training, "activation": activation}
        everything = grads((1, 1, 1), **options)
        for wanted in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (0, 0, 0)):
            for found, expected, want in zip(grads(wanted, **options), everything, wanted, strict=True):
                assert torch.equal(found, expected) if want else found is None


def window_places(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """What ``F.max_pool2d`` returns as flat indices of the plane, as places in the windows."""
    _, flat = F.max_pool2d(x, kernel_size, stride, padding, return_indices=True)
    rows = torch.arange(flat.shape[2], device=x.device).unsqueeze(1) * stride - padding
    columns = torch.arange(flat.shape[3], device=x.device) * stride - padding
    return ((flat // x.shape[3] - rows) * kernel_size + flat % x.shape[3] - columns).to(torch.uint8)


@column.cases
@column.dtypes
@column.activations
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_is_the_pooled_map_to_the_bit(
    device: str, provider: str, dtype: torch.dtype, activation: str, layout: str
) -> None:
    """Ties, NaN and infinities too: with few different values, and with a NaN or two in many windows."""
    x, weight, bias, mean, var = inputs((2, 8, 9, 10), dtype, device)
    x = torch.randint(-3, 3, x.shape, device=device).to(dtype)
    x[:, 1] = x[:, 1].where(torch.rand(2, 9, 10, device=device) < 0.8, float("nan"))
    x[:, 2] = x[:, 2].where(torch.rand(2, 9, 10, device=device) < 0.8, float("inf"))
    x[:, 3] = x[:, 3].where(torch.rand(2, 9, 10, device=device) < 0.5, float("-inf"))
    x[1, 4] = float("-inf")
    x, window = column.LAYOUTS[layout](x), (3, 2, 1)
    factors = (x, mean, var.rsqrt(), weight, bias)
    y, indices = batch_norm_act_max_pool_apply(*factors, activation, 0.1, provider=provider)
    whole = batch_norm_act_apply(*factors, None, activation, 0.1, provider=provider)
    expected = F.max_pool2d(whole, *window)
    assert indices.dtype == torch.uint8 and indices.stride() == y.stride()
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, window_places(whole, *window))


@column.cases
@column.dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "column-slice"])
def test_primitives(device: str, provider: str, dtype: torch.dtype, layout: str, poison: None) -> None:
    x, weight, bias, mean, var = inputs((6, 8, 5, 8), dtype, device)
    x = column.LAYOUTS[layout](x)
    factors = (x, mean, (var + 1e-5).rsqrt(), weight, bias)
    grad = torch.randn(6, 8, 3, 4, device=device).to(dtype)
    for activation in ("relu", "leaky_relu", "none"):

        def run(made_by: str, activation: str = activation) -> list[Tensor]:
            y, indices = batch_norm_act_max_pool_apply(*factors, activation, 0.3, provider=made_by)
            arguments = (grad, indices, *factors, activation, 0.3)
            sums = batch_norm_act_max_pool_reduce(*arguments, provider=made_by)
            grad_x = batch_norm_act_max_pool_input_grad(*arguments, *sums, True, provider=made_by)
            constant = batch_norm_act_max_pool_input_grad(*arguments, None, None, False, provider=made_by)
            assert grad_x.stride() == constant.stride() == empty_like(x).stride()
            return [y, indices, *sums, grad_x, constant]

        names = ("y", "indices", "sum_g", "sum_g_xhat", "grad_x", "constant")
        for what, found, expected in zip(names, run(provider), run("reference"), strict=True):
            assert found.stride() == expected.stride()
            if what == "indices":
                assert torch.equal(found, expected)
            else:
                column.assert_close(what, found, expected, expected.double())


@pytest.mark.parametrize("provider", ["reference", "cpu"])
@column.activations
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_gradcheck(provider: str, activation: str, training: bool) -> None:
    x, weight, bias, mean, var = inputs((2, 4, 5, 4), torch.float64, "cpu")
    leaves = [t.requires_grad_() for t in (x, weight, bias)]

    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        running = (None, None) if training else (mean, var)
        options = {"training": training, "activation": activation, "negative_slope": 0.3}
        return batch_norm_act_max_pool(x, weight, bias, *running, **options, provider=provider)

    torch.autograd.gradcheck(function, leaves)


@column.cases
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_nan_and_inf_pass_through(device: str, provider: str, value: float, training: bool) -> None:
    x, weight, bias, mean, var = inputs((3, 5, 6, 6), torch.float32, device)
    weight[0] = 0  # zero times infinity
    x[1, 0, 1, 2] = x[2, 2, 0, 0] = value
    grad = torch.randn(3, 5, 3, 3, device=device)
    grad[2, 4, 2, 2] = value

    def run(function: Callable[..., Tensor], **more: Any) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = function(*leaves, mean.clone(), var.clone(), training=training, **more)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad)]

    found, expected = run(batch_norm_act_max_pool, provider=provider), run(composition)
    assert torch.equal(found[0].isnan(), expected[0].isnan())
    for name, mine, other in zip(("y", "x", "weight", "bias"), found, expected, strict=True):
        # Torch adds zero times infinity for an infinite x that is not the largest of a window; we do not look at it.
        if name != "weight":
            assert torch.equal(mine.isfinite(), other.isfinite()), name
        torch.testing.assert_close(mine[other.isfinite()], other[other.isfinite()], rtol=1e-4, atol=1e-5)

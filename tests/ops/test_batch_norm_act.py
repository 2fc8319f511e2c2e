"""batch_norm_act: every provider against F.batch_norm, add and activation in float64 and in the same dtype."""

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
    batch_norm_act,
    batch_norm_act_apply,
    batch_norm_act_input_grad,
    batch_norm_act_reduce,
    batch_norm_stats,
)
from auglocal_ext.ops.layout import empty_like

OP = "batch_norm_act"
SHAPES = [
    (5, 7, 3, 4),
    (4, 19, 7, 7),
    (3, 16, 8, 8),
    (2, 130, 6, 5),
    (33, 10),
    (40, 264),
    (2, 5, 11),
    (1, 1, 4, 5),
    (1, 24, 5, 8),
    (2, 3, 2, 3, 4),
]


def composition(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
) -> Tensor:
    """The ops of torch that the op stands for."""
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if residual is not None:
        y = y + residual
    if activation == "none":
        return y
    return F.relu(y) if activation == "relu" else F.leaky_relu(y, negative_slope)


def inputs(shape: tuple[int, ...], dtype: torch.dtype, device: str, parameters: torch.dtype | None = None) -> list:
    """x, weight, bias, running mean, running variance, residual; the vectors in float32 where x is in less."""
    if parameters is None:
        parameters = torch.float64 if dtype == torch.float64 else torch.float32
    channels = shape[1:2]
    vectors = [torch.randn(channels, device=device) for _ in range(3)] + [torch.rand(channels, device=device) + 0.5]
    x = torch.randn(shape, device=device) * 2 + 0.7
    residual = torch.randn(shape, device=device)
    return [x.to(dtype), *(v.to(parameters) for v in vectors), residual.to(dtype)]


def compare(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    provider: str,
    grad: Tensor | None = None,
    **options: Any,
) -> None:
    """Result, running statistics and every gradient against the composition in float64 and in the inputs' dtype."""
    grad = torch.randn(x.shape, device=x.device).to(x.dtype) if grad is None else grad

    def run(function: Callable[..., Tensor], wide: bool = False) -> list[Tensor]:
        def new(tensor: Tensor | None) -> Tensor | None:
            if tensor is None:
                return None
            # detach keeps the strides
            return (tensor.double() if wide else tensor).detach().requires_grad_()

        leaves = [new(tensor) for tensor in (x, weight, bias, residual)]
        running = [None if r is None else (r.double() if wide else r.clone()) for r in (running_mean, running_var)]
        y = function(*leaves[:3], *running, residual=leaves[3], **options)
        wanted = [leaf for leaf in leaves if leaf is not None]
        grads = torch.autograd.grad(y, wanted, grad.to(y.dtype))
        assert [g.dtype for g in grads] == [leaf.dtype for leaf in wanted]
        return [y.detach(), *(r for r in running if r is not None), *grads]

    ours = run(lambda *a, **o: batch_norm_act(*a, **o, provider=provider))
    names = ["y"] + [n for n, r in (("running_mean", running_mean), ("running_var", running_var)) if r is not None]
    names += [
        f"gradient of {n}"
        for n, t in (("x", x), ("weight", weight), ("bias", bias), ("residual", residual))
        if t is not None
    ]
    same, oracle = run(composition), run(composition, wide=True)
    for name, mine, other, exact in zip(names, ours, same, oracle, strict=True):
        column.assert_close(name, mine, other, exact)


@column.cases
@column.dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_shapes(device: str, provider: str, dtype: torch.dtype, shape: tuple[int, ...], poison: None) -> None:
    compare(*inputs(shape, dtype, device), provider, training=True)


@column.cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", column.LAYOUTS)
def test_layouts(device: str, provider: str, dtype: torch.dtype, layout: str, poison: None) -> None:
    x, *vectors, residual = inputs((4, 24, 4, 8), dtype, device)
    x = column.LAYOUTS[layout](x)
    compare(x, *vectors, residual.reshape(x.shape), provider, training=True)
    y = batch_norm_act(x, *vectors, training=True, provider=provider)
    assert y.stride() == empty_like(x).stride()
    if layout in ("contiguous", "channels-last"):
        assert y.stride() == x.stride()


@column.cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("x_layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("other", ["contiguous", "channels-last", "channel-slice", "expanded-positions", "transposed"])
def test_layouts_of_residual_and_gradient(
    device: str, provider: str, dtype: torch.dtype, x_layout: str, other: str, poison: None
) -> None:
    x, *vectors, residual = inputs((3, 8, 4, 4), dtype, device)
    grad = torch.randn(x.shape, device=device).to(dtype)
    x, change = column.LAYOUTS[x_layout](x), column.LAYOUTS[other]
    compare(x, *vectors, change(residual), provider, grad=grad, training=True)
    compare(x, *vectors, residual, provider, grad=change(grad), training=True)


@column.cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize(
    "shape", [(2, 3, 17, 19), (2, 8, 24, 36), (1, 264, 3, 8), (70, 4, 8, 8), (2, 1, 96, 97)], ids=str
)
def test_maps_larger_than_one_pass_of_a_block(
    device: str, provider: str, dtype: torch.dtype, layout: str, shape: tuple[int, ...], poison: None
) -> None:
    x, *rest = inputs(shape, dtype, device)
    compare(column.LAYOUTS[layout](x), *rest, provider, training=True)


@column.cases
@column.activations
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "no-residual"])
def test_options(
    device: str, provider: str, activation: str, training: bool, with_residual: bool, poison: None
) -> None:
    *others, residual = inputs((5, 6, 3, 4), torch.float32, device)
    residual = residual if with_residual else None
    options = {"training": training, "activation": activation, "negative_slope": 0.2}
    compare(*others, residual, provider, **options)
    compare(*others, residual, provider, **options, momentum=0.7, eps=0.3)


@column.cases
@pytest.mark.parametrize(("affine", "tracked"), list(itertools.product((True, False), repeat=2)))
def test_without_weights_or_running_statistics(device: str, provider: str, affine: bool, tracked: bool) -> None:
    x, weight, bias, mean, var, residual = inputs((5, 6, 3, 4), torch.float32, device)
    parameters, running = (weight, bias) if affine else (None, None), (mean, var) if tracked else (None, None)
    compare(x, *parameters, *running, residual, provider, training=True)
    if tracked:
        compare(x, *parameters, *running, residual, provider, training=False)
    if affine:
        compare(x, weight, None, *running, residual, provider, training=True)


@column.cases
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_parameters_in_the_dtype_of_the_map(device: str, provider: str, dtype: torch.dtype) -> None:
    *others, running_mean, running_var, residual = inputs((5, 6, 3, 4), dtype, device, parameters=dtype)
    for training in (True, False):
        compare(*others, running_mean, running_var, residual, provider, training=training)


@column.cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_wanted_gradients_alone(device: str, provider: str, layout: str, poison: None) -> None:
    x, weight, bias, mean, var, residual = inputs((5, 6, 3, 4), torch.float32, device)
    x, grad = column.LAYOUTS[layout](x), torch.randn(x.shape, device=device)

    def grads(wanted: tuple[int, ...], **options: Any) -> list[Tensor | None]:
        leaves = [t.detach().requires_grad_(bool(w)) for t, w in zip((x, weight, bias, residual), wanted, strict=True)]
        y = batch_norm_act(*leaves[:3], mean.clone(), var, residual=leaves[3], provider=provider, **options)
        assert y.requires_grad == any(wanted)
        if any(wanted):
            y.backward(grad)
        return [leaf.grad for leaf in leaves]

    for training, activation in itertools.product((True, False), ("relu", "none")):
        options = {"training": training, "activation": activation}
        everything = grads((1, 1, 1, 1), **options)
        for wanted in ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 0, 1), (0, 0, 0, 0)):
            for found, expected, want in zip(grads(wanted, **options), everything, wanted, strict=True):
                assert torch.equal(found, expected) if want else found is None


@column.cases
def test_gradient_of_the_residual_without_activation_is_the_upstream_one(device: str, provider: str) -> None:
    x, weight, bias, mean, var, residual = inputs((5, 6, 3, 4), torch.float32, device)
    grad = torch.randn(5, 6, 1, 1, device=device).expand_as(x)
    residual.requires_grad_()
    y = batch_norm_act(
        *(x, weight, bias, mean, var),
        **{"residual": residual, "training": True, "activation": "none", "provider": provider},
    )
    (found,) = torch.autograd.grad(y, residual, grad)
    assert found.data_ptr() == grad.data_ptr()
    zeros, none = torch.zeros(6, device=device), (None, None, None)
    made = batch_norm_act_input_grad(
        *(grad, x, zeros, zeros, *none, "none", 0.0, None, None, False, True), provider=provider
    )
    assert made[1] is grad


@column.cases
@column.dtypes
@pytest.mark.parametrize("layout", ["contiguous", "channels-last", "column-slice", "channel-slice"])
def test_primitives(device: str, provider: str, dtype: torch.dtype, layout: str, poison: None) -> None:
    x, weight, bias, _, _, residual = inputs((6, 8, 4, 4), dtype, device)
    x, channels_last = column.LAYOUTS[layout](x), layout in ("channels-last", "channel-slice")
    assert (empty_like(x).stride(1) == 1) == (layout == "channels-last")
    x = x.mT.contiguous(memory_format=torch.channels_last).mT if layout == "channel-slice" else x
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var = batch_norm_stats(x, provider=provider)
    assert mean.dtype == var.dtype == wide
    column.assert_close("mean", mean, mean, x.double().mean((0, 2, 3)))
    column.assert_close("var", var, x.to(wide).var((0, 2, 3), correction=0), x.double().var((0, 2, 3), correction=0))
    factors = (mean, (var + 1e-5).rsqrt(), weight, bias)
    grad = torch.randn(6, 8, 1, 1, device=device).to(dtype).expand_as(x)  # as of a pooled head
    for activation, added in itertools.product(("relu", "leaky_relu", "none"), (None, residual)):

        def run(
            made_by: str, activation: str = activation, added: Tensor | None = added, grad: Tensor = grad
        ) -> list[Tensor]:
            arguments = (x, *factors, added, activation, 0.3)
            y = batch_norm_act_apply(*arguments, provider=made_by)
            sums = batch_norm_act_reduce(grad, *arguments, provider=made_by)
            grads = batch_norm_act_input_grad(grad, *arguments, *sums, True, True, provider=made_by)
            constant, nothing = batch_norm_act_input_grad(grad, *arguments, None, None, False, False, provider=made_by)
            assert nothing is None and grads[1] is not None
            return [y, *sums, *grads, constant]

        for what, found, expected in zip(
            ("y", "sum_g", "sum_g_xhat", "grad_x", "grad_residual", "constant"),
            run(provider),
            run("reference"),
            strict=True,
        ):
            column.assert_close(what, found, expected, expected.double())
            if what in ("y", "grad_x", "constant"):
                assert found.stride() == empty_like(x).stride()
                assert (found.stride(1) == 1) == channels_last


@column.cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_vectors_that_begin_anywhere(device: str, provider: str, dtype: torch.dtype, layout: str, poison: None) -> None:
    x, *vectors, residual = inputs((4, 16, 4, 4), dtype, device)
    views = [torch.cat([vector[:1], vector])[1:] for vector in vectors]
    assert all(view.data_ptr() % 16 for view in views)
    x, residual = (column.LAYOUTS[layout](tensor) for tensor in (x, residual))
    compare(x, *views, residual, provider, training=True)
    compare(x, *views, residual, provider, training=False)


# So many that the sums of blocks are merged by groups, and these by one block.
MANY = [("channels-last", (80, 8, 32, 64)), ("contiguous", (140000, 1, 4, 1))]


@column.cases
@pytest.mark.parametrize(("layout", "shape"), MANY, ids=["channels-last", "contiguous"])
def test_many_partial_sums(device: str, provider: str, layout: str, shape: tuple[int, ...], poison: None) -> None:
    if provider == "triton" and device == "cpu":
        pytest.skip("takes long in the interpreter")
    x, weight, bias, running_mean, running_var, _ = inputs(shape, torch.float32, device)
    x = column.LAYOUTS[layout](x + 100)
    grad, wide = x.roll(1, 0) - 100, x.double()
    exact = (wide.mean((0, 2, 3)).float(), wide.var((0, 2, 3), correction=0).float())
    for _ in range(2):  # the second time with the counters that the first one has left
        mean, var = batch_norm_stats(x, provider=provider)
        torch.testing.assert_close((mean, var), exact, rtol=1e-5, atol=0)
        sums = batch_norm_act_reduce(grad, x, mean, var, weight, bias, None, "none", provider=provider)
        xhat = (wide - mean[:, None, None]) * var[:, None, None]
        for found, factor in zip(sums, (torch.ones_like(wide), xhat), strict=True):
            products = grad.double() * factor
            error = (found - products.sum((0, 2, 3))).abs()
            assert (error <= 1e-6 * products.abs().sum((0, 2, 3))).all()


@column.cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
@pytest.mark.parametrize("mean", [1e4, -1e4, 3e5])
def test_large_means(device: str, provider: str, layout: str, mean: float) -> None:
    x = column.LAYOUTS[layout](torch.randn(16, 6, 9, 8, device=device) + mean)
    exact_var, exact_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    found_mean, found_var = batch_norm_stats(x, provider=provider)
    # The mean can be no better than its last digit, a thousandth of the deviation at 1e4.
    assert (found_mean - exact_mean).abs().max() <= abs(mean) * 2**-23
    torch.testing.assert_close(found_var.double(), exact_var, rtol=1e-5, atol=0)


@column.cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_variance_beside_a_value_far_from_all_others(device: str, provider: str, layout: str) -> None:
    x = torch.randn(16, 2, 64, 64, device=device)
    x[0, :, 0, 0] = 1e4  # by which alone all values would be shifted: an error of some percent
    _, found = batch_norm_stats(column.LAYOUTS[layout](x), provider=provider)
    torch.testing.assert_close(found.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


@column.cases
@pytest.mark.parametrize("value", [0.0, 1.5, 1e4])
def test_constant_channels(device: str, provider: str, value: float) -> None:
    x, weight, bias, mean, var, residual = inputs((4, 3, 5, 5), torch.float32, device)
    x[:, 1] = value
    assert batch_norm_stats(x, provider=provider)[1][1] == 0
    compare(x, weight, bias, mean, var, residual, provider, training=True)
    y = batch_norm_act(x, weight, bias, None, None, training=True, activation="none", provider=provider)
    assert torch.equal(y[:, 1], bias[1].expand_as(y[:, 1]))


@column.cases
@column.activations
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_nan_and_inf_pass_through(device: str, provider: str, activation: str, value: float, training: bool) -> None:
    x, weight, bias, mean, var, residual = inputs((4, 5, 3, 3), torch.float32, device)
    weight[0] = 0  # zero times infinity
    x[1, 0, 1, 2] = x[2, 2, 0, 0] = residual[0, 1, 1, 1] = value
    grad = torch.randn(x.shape, device=device)
    grad[3, 4, 2, 2] = value
    options = {"training": training, "activation": activation}

    def run(function: Callable[..., Tensor], **more: Any) -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
        running = [mean.clone(), var.clone()]
        y = function(*leaves[:3], *running, residual=leaves[3], **options, **more)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad), *running]

    names = ("y", "x", "weight", "bias", "residual", "running_mean", "running_var")
    for name, found, expected in zip(names, run(batch_norm_act, provider=provider), run(composition), strict=True):
        # An infinite sum may have become a NaN on the way, in torch as here.
        assert torch.equal(found.isfinite(), expected.isfinite()), name
        if name in ("y", "residual"):
            assert torch.equal(found.isnan(), expected.isnan()), name
        fine = expected.isfinite()
        torch.testing.assert_close(found[fine], expected[fine], rtol=1e-4, atol=1e-5)


@column.cases
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (1, 3)], ids=str)
def test_one_value_per_channel(device: str, provider: str, shape: tuple[int, ...]) -> None:
    tensors = inputs(shape, torch.float32, device)
    with pytest.raises(ValueError) as expected:
        composition(*tensors[:5], training=True)
    with pytest.raises(ValueError) as found:
        batch_norm_act(*tensors[:5], training=True, provider=provider)
    assert str(found.value) == str(expected.value)
    compare(*tensors, provider, training=False)

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
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext.memory import MemoryMeter
from auglocal_ext.ops import (
    batch_norm_act,
    batch_norm_act_apply,
    batch_norm_act_input_grad,
    batch_norm_act_reduce,
    batch_norm_factors,
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
def test_ops_of_several_passes_are_their_passes(
    device: str, provider: str, dtype: torch.dtype, layout: str, poison: None
) -> None:
    """To the bit, and what is not needed has no elements."""
    x, weight, bias, *running, residual = inputs((5, 6, 3, 4), dtype, device)
    weight, bias, *running = (vector.float() for vector in (weight, bias, *running))
    x = column.LAYOUTS[layout](x)
    grad, batches = torch.randn_like(x), torch.tensor(3, device=device)
    names = ("factors_", "act_apply", "act_forward_", "act_reduce", "act_input_grad", "act_backward")
    factors_, apply, forward_, reduce, input_grad, backward = (column.op(f"batch_norm_{n}", provider) for n in names)
    for added, slope in itertools.product((None, residual), (0.0, 0.3, 1.0)):
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

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
        running = [mean.clone(), var.clone()]
        y = function(leaves, running)
        (y * y).sum().backward()
        results.append([y.detach(), *running, *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


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

    def once() -> list[Tensor]:
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias, residual)]
        running = [mean.clone(), var.clone()]
        y = batch_norm_act(*leaves[:3], *running, residual=leaves[3], training=True, provider=provider)
        return [y.detach(), *running, *torch.autograd.grad(y, leaves, grad)]

    for first, again in zip(once(), once(), strict=True):
        assert torch.equal(first, again)


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


@column.gpu_cases
def test_side_stream(device: str, provider: str) -> None:
    x, weight, bias, mean, var, residual = inputs((64, 128, 32, 32), torch.float32, device)
    leaves = [t.requires_grad_() for t in (weight, bias)]

    def run(x: Tensor) -> list[Tensor]:
        y = batch_norm_act(x, *leaves, mean.clone(), var.clone(), residual=residual, training=True, provider=provider)
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]

    column.assert_follows_the_stream(run, x)


@column.gpu_cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_graph_capture(device: str, provider: str, layout: str) -> None:
    x, weight, bias, mean, var, residual = inputs((16, 32, 8, 8), torch.bfloat16, device)
    x = column.LAYOUTS[layout](x)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def step() -> list[Tensor]:
        y = batch_norm_act(*leaves[:3], mean, var, residual=leaves[3], training=True, provider=provider)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    column.assert_replays(step, x, mean, var)


@column.gpu_cases
def test_graph_replays_beside_calls_on_the_stream_of_its_capture(device: str, provider: str) -> None:
    captured, called = (torch.randn(64, 64, 32, 32, device=device) + i for i in range(2))
    x, y = (column.LAYOUTS["channels-last"](t) for t in (captured, called))
    expected = batch_norm_stats(x, provider=provider), batch_norm_stats(y, provider=provider)
    own, other = torch.cuda.Stream(), torch.cuda.Stream()
    own.wait_stream(torch.cuda.current_stream())
    other.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=own):
        replayed = batch_norm_stats(x, provider=provider)
    for _ in range(50):  # blocks of both at once must not draw each other's tickets
        with torch.cuda.stream(other):
            graph.replay()
        with torch.cuda.stream(own):
            eager = batch_norm_stats(y, provider=provider)
        torch.cuda.synchronize()
        for found, wanted in zip((*replayed, *eager), (*expected[0], *expected[1]), strict=True):
            assert torch.equal(found, wanted)


@column.gpu_cases
def test_second_device(device: str, provider: str) -> None:
    column.assert_runs_beside_the_current_device(
        lambda other: compare(*inputs((5, 7, 3, 4), torch.float32, other), provider, training=True)
    )


@column.gpu_cases
def test_does_not_synchronise(device: str, provider: str) -> None:
    x, weight, bias, mean, var, residual = inputs((16, 32, 8, 8), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def step() -> None:
        y = batch_norm_act(*leaves[:3], mean, var, residual=leaves[3], training=True, provider=provider)
        torch.autograd.grad(y, leaves, x)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.large
@column.gpu_cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_more_than_two_billion_elements(device: str, provider: str, layout: str) -> None:
    if provider == "reference":
        pytest.skip("plain torch, several copies of the map in float32")
    channels = 16
    x = column.LAYOUTS[layout](torch.randn(33, channels, 2048, 2048, dtype=torch.float16, device=device))
    assert x.numel() > 2**31
    mean, var = batch_norm_stats(x, provider=provider)
    torch.testing.assert_close(mean, x.mean((0, 2, 3), dtype=torch.float32), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var, torch.ones_like(var), rtol=1e-3, atol=0)
    rstd, none = var.rsqrt(), (None, None, None)
    y = batch_norm_act_apply(x, mean, rstd, *none, "none", provider=provider)
    last = (x[-1].float() - mean[:, None, None]) * rstd[:, None, None]
    torch.testing.assert_close(y[-1].float(), last, rtol=2e-3, atol=1e-3)
    sums = batch_norm_act_reduce(y, x, mean, rstd, *none, "relu", provider=provider)
    count = x.numel() // channels
    torch.testing.assert_close(sums[1] / count, torch.full_like(var, 0.5), rtol=1e-2, atol=0)
    grad_x, _ = batch_norm_act_input_grad(
        *(y, x, mean, rstd, *none, "relu", 0.0, *sums, True, False), provider=provider
    )
    masked = torch.where(last > 0, y[-1].float(), 0)
    expected = masked - (sums[0] / count)[:, None, None] - last * (sums[1] / count)[:, None, None]
    torch.testing.assert_close(grad_x[-1].float(), expected * rstd[:, None, None], rtol=4e-3, atol=4e-3)

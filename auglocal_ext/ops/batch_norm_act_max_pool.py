"""Batch normalisation, activation and max pooling as one op: the stem of the ImageNet networks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from . import nodes, registry
from .batch_norm_act import batch_norm_factors
from .batch_norm_checks import check_eps, check_tensors, slope_of, wide_dtype
from .batch_norm_passes import count_as_written, give_gradients, refuse_stand_in, updatable
from .deferred import check_values
from .flags import not_a_flag
from .layout import empty_like
from .reference.batch_norm_act_max_pool import Window, empty_pooled, first_inside, outside, pooled_size
from .transforms import refuse_transforms

NAME = "batch_norm_act_max_pool"
_APPLY, _REDUCE, _INPUT_GRAD = (f"{NAME}_{name}" for name in ("apply", "reduce", "input_grad"))
_FORWARD_, _BACKWARD = f"{NAME}_forward_", f"{NAME}_backward"
_INSTEAD = "F.batch_norm and F.max_pool2d"


def batch_norm_act_max_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 1,
    num_batches_tracked: Tensor | None = None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    provider: str | None = None,
) -> Tensor:
    """y = max over windows of act((x - mean) / sqrt(var + eps) * weight + bias), mean and var per channel.

    x (N, C, H, W) in float16, bfloat16, float32 or float64, any strides; kernel_size, stride and padding one number or
    (height, width), a window of at most 256 elements (16x16), padding at most half of it. Returns y (N, C, H', W') with
    H' = floor((H + 2 padding - kernel_size) / stride) + 1, in x's dtype, channels-last where x is. All other arguments,
    and the running statistics, are those of :func:`auglocal_ext.ops.batch_norm_act`.

    Equal to ``F.max_pool2d(act(F.batch_norm(x)))``: maxima are taken of values rounded to x's dtype, the first of equal
    ones gets the gradient, a NaN is larger than every number. Between forward and backward x, a byte for each element
    of y (the place in its window) and the (C,) vectors are held, and no normalised map. Differentiable once.

    Raises TypeError for a wrong dtype and for a ``training`` that is neither True nor False, ValueError for a wrong
    shape, device, window or option and for one value per channel in training, RuntimeError for a provider that is not
    available, NotImplementedError under ``torch.func`` and for tensors with a tangent of forward-mode AD.
    """
    if training is not True and training is not False:
        raise not_a_flag("training", training)
    if training and updatable(x, weight, bias, running_mean, running_var, None, num_batches_tracked):
        written = running_mean, running_var, num_batches_tracked
        window, slope = _known_window(x, kernel_size, stride, padding), slope_of(activation, negative_slope)
        check_eps(eps, training)
        op = registry.chosen(NAME, x, provider, _FORWARD_, beside=window)
        count_as_written(*written)
        recorded = registry.recorder(op)
        return recorded(x, *written, weight, bias, float(momentum), float(eps), slope, *window)
    refuse_transforms(NAME, _INSTEAD, x, weight, bias)
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_tensors(x, vectors, None)
    window = _window(x, kernel_size, stride, padding)
    slope = slope_of(activation, negative_slope)
    if training:
        refuse_stand_in(NAME)
    mean, rstd = batch_norm_factors(
        x.detach(),
        running_mean,
        running_var,
        num_batches_tracked,
        training=training,
        momentum=momentum,
        eps=eps,
        provider=provider,
    )
    op = registry.chosen(NAME, x, provider, beside=window)
    made = registry.run(op, x, mean, rstd, weight, bias, slope, *window, training)
    return made[0] if torch.compiler.is_compiling() else made


def batch_norm_act_max_pool_apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "relu",
    negative_slope: float = 0.01,
    *,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 1,
    provider: str | None = None,
) -> tuple[Tensor, Tensor]:
    """y and indices (N, C, H', W') uint8, the place of each maximum: row of its window times kernel width plus column.

    Both channels-last where x is. Not differentiable, as the two functions below.
    """
    window, slope = _window(x, kernel_size, stride, padding), slope_of(activation, negative_slope)
    return registry.chosen(NAME, x, provider, _APPLY)(x, mean, rstd, weight, bias, slope, *window)


def batch_norm_act_max_pool_reduce(
    grad: Tensor,
    indices: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str = "relu",
    negative_slope: float = 0.01,
    *,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 1,
    provider: str | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_g and sum_g_xhat (C,), the gradients of bias and weight in float32 (float64 for a double x).

    g is the gradient of the normalised value: ``grad``, (N, C, H', W') in x's dtype and any strides, at the element
    which ``indices`` names, times act'.

    Raises ValueError for indices that name no element of x, on CUDA in a later call, as for wrong labels; until then
    they count as gradients of 0.
    """
    window, slope = _window(x, kernel_size, stride, padding), slope_of(activation, negative_slope)
    grad, indices = _checked_pooled(grad, indices, x, window)
    return registry.chosen(NAME, x, provider, _REDUCE)(grad, indices, x, mean, rstd, weight, bias, slope, *window)


def batch_norm_act_max_pool_input_grad(
    grad: Tensor,
    indices: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: str,
    negative_slope: float,
    sum_g: Tensor | None,
    sum_g_xhat: Tensor | None,
    training: bool,
    *,
    kernel_size: int | Sequence[int] = 3,
    stride: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 1,
    provider: str | None = None,
) -> Tensor:
    """Gradient of x, laid out as x; in eval mode (``training=False``) the sums are not read and may be None.

    Raises as :func:`batch_norm_act_max_pool_reduce`.
    """
    window, slope = _window(x, kernel_size, stride, padding), slope_of(activation, negative_slope)
    grad, indices = _checked_pooled(grad, indices, x, window)
    if training is not True and training is not False:
        raise not_a_flag("training", training)
    sums = (sum_g, sum_g_xhat) if training else (None, None)
    arguments = (grad, indices, x, mean, rstd, weight, bias, slope, *sums, *window)
    return registry.chosen(NAME, x, provider, _INPUT_GRAD)(*arguments)


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    if type(value) is int and value >= least:
        return value, value
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"expected {name} of at least {least}, one number or (height, width), got {value!r}")
    return pair[0], pair[1]


def _window(
    x: Tensor, kernel_size: int | Sequence[int], stride: int | Sequence[int], padding: int | Sequence[int]
) -> Window:
    return _window_of(x.shape, kernel_size, stride, padding)


def _known_window(
    x: Tensor, kernel_size: int | Sequence[int], stride: int | Sequence[int], padding: int | Sequence[int]
) -> Window:
    """:func:`_window`, looked up where it was asked before; not for code that ``torch.compile`` reads."""
    try:
        return _remembered_window(x.shape, kernel_size, stride, padding)
    except TypeError:  # a list cannot be looked up
        return _window(x, kernel_size, stride, padding)


def _window_of(
    shape: Sequence[int], kernel_size: int | Sequence[int], stride: int | Sequence[int], padding: int | Sequence[int]
) -> Window:
    if len(shape) != 4:
        raise ValueError(f"expected x of shape (N, C, H, W), got {tuple(shape)}")
    kernel = _pair("kernel_size", kernel_size, 1)
    window = (*kernel, *_pair("stride", stride, 1), *_pair("padding", padding, 0))
    if kernel[0] * kernel[1] > 256:
        raise ValueError(
            f"expected a window of at most 256 elements, whose places fit into a byte, got kernel_size {kernel}; "
            "use batch_norm_act and F.max_pool2d"
        )
    if 2 * window[4] > kernel[0] or 2 * window[5] > kernel[1]:
        raise ValueError(f"expected padding of at most half of kernel_size {kernel}, got {window[4:]}")
    if min(pooled_size(shape, window)) < 1:
        raise ValueError(
            f"expected a map no smaller than kernel_size {kernel} less twice the padding {window[4:]}, "
            f"got x {tuple(shape)}"
        )
    return window


_remembered_window = lru_cache(maxsize=1024, typed=True)(_window_of)


def _checked_pooled(grad: Tensor, indices: Tensor, x: Tensor, window: Window) -> tuple[Tensor, Tensor]:
    """Both as the kernels can take them, which read x wherever an index says; autograd has no need of it."""
    shape = (*x.shape[:2], *pooled_size(x.shape, window))
    for name, tensor, dtype in (("grad", grad, x.dtype), ("indices", indices, torch.uint8)):
        if tensor.shape != shape or tensor.dtype != dtype:
            raise ValueError(f"expected {name} {shape} in {dtype}, got {tuple(tensor.shape)} in {tensor.dtype}")
    bad = outside(indices, x, window)
    expected = f"expected those that {NAME}_apply returned for this x and kernel_size, stride and padding {window}"

    def at_once(bad: Tensor) -> str:
        first = tuple(bad.nonzero()[0].tolist())
        return f"index {int(indices[first])} at {first} names no element of x {tuple(x.shape)}: {expected}"

    def late(count: int) -> str:
        return f"{count} indices of an earlier call named no element of x, and counted as gradients of 0: {expected}"

    check_values(indices, lambda: bad, at_once, late)
    # Where the host cannot look, nothing outside of x is read.
    return grad.masked_fill(bad, 0), torch.where(bad, first_inside(indices, window), indices)


def _fake_apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, slope: float, *window: int
) -> tuple[Tensor, Tensor]:
    size = window[:6]  # what follows, of the op itself, is whether the statistics are x's own
    return empty_pooled(x, size, x.dtype), empty_pooled(x, size, torch.uint8)


def _fake_reduce(grad: Tensor, indices: Tensor, x: Tensor, mean: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(mean)


def _fake_input_grad(grad: Tensor, indices: Tensor, x: Tensor, *_: Any) -> Tensor:
    return empty_like(x)


def _forward(provider: str, *arguments: Any) -> tuple[Tensor, Tensor]:
    return registry.overload(_APPLY, provider)(*arguments[:-1])


def _fake_forward_(x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    mean = x.new_empty(x.shape[1], dtype=wide_dtype(x))
    return *_fake_apply(x, mean, mean, None, None, 0.0, *arguments[-6:]), mean, torch.empty_like(mean)


def _forward_(provider: str, x: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *written, weight, bias, momentum, eps, slope = arguments[:-6]
    mean, rstd = registry.overload("batch_norm_factors_", provider)(x, *written, momentum, eps)
    apply = registry.overload(_APPLY, provider)
    return *apply(x, mean, rstd, weight, bias, slope, *arguments[-6:]), mean, rstd


def _fake_backward(grad: Tensor, indices: Tensor, x: Tensor, mean: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, training, need_x, need_vectors = others
    sums = _fake_reduce(grad, indices, x, mean) if need_vectors or (training and need_x) else _no_sums(mean)
    return empty_like(x) if need_x else x.new_empty(0), *sums


def _no_sums(mean: Tensor) -> tuple[Tensor, Tensor]:
    return mean.new_empty(0), mean.new_empty(0)


def _passes_backward(provider: str, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, training, need_x, need_vectors = arguments
    tensors, window = tensors[:-6], tensors[-6:]
    x, mean = tensors[2:4]
    sums, through_statistics = _no_sums(mean), training and need_x
    if through_statistics or need_vectors:
        sums = registry.overload(_REDUCE, provider)(*tensors, *window)
    if not need_x:
        return x.new_empty(0), *sums
    kept = sums if through_statistics else (None, None)
    return registry.overload(_INPUT_GRAD, provider)(*tensors, *kept, *window), *sums


# On CUDA torch adds the gradients of max pooling with atomics.
TABLE = registry.table(NAME, aten=("cpu",))

_FACTORS = "Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, float slope"
_WINDOW = "int kernel_h, int kernel_w, int stride_h, int stride_w, int padding_h, int padding_w"

registry.primitive(TABLE, _APPLY, f"({_FACTORS}, {_WINDOW}) -> (Tensor y, Tensor indices)", _fake_apply, "apply")
registry.primitive(
    TABLE,
    _REDUCE,
    f"(Tensor grad, Tensor indices, {_FACTORS}, {_WINDOW}) -> (Tensor sum_g, Tensor sum_g_xhat)",
    _fake_reduce,
    "reduce",
)
registry.primitive(
    TABLE,
    _INPUT_GRAD,
    f"(Tensor grad, Tensor indices, {_FACTORS}, Tensor? sum_g, Tensor? sum_g_xhat, {_WINDOW}) -> Tensor",
    _fake_input_grad,
    "input_grad",
)
registry.composite(
    TABLE,
    _FORWARD_,
    "(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, Tensor? weight, "
    f"Tensor? bias, float momentum, float eps, float slope, {_WINDOW}) "
    "-> (Tensor y, Tensor indices, Tensor mean, Tensor rstd)",
    _fake_forward_,
    _forward_,
)
registry.composite(
    TABLE,
    _BACKWARD,
    f"(Tensor grad, Tensor indices, {_FACTORS}, {_WINDOW}, bool training, bool need_x, bool need_vectors) "
    "-> (Tensor grad_x, Tensor sum_g, Tensor sum_g_xhat)",
    _fake_backward,
    _passes_backward,
)
registry.composite(
    TABLE, NAME, f"({_FACTORS}, {_WINDOW}, bool training) -> (Tensor y, Tensor indices)", _fake_apply, _forward
)


def _gradients(masked: bool, **fixed: Any) -> nodes.Gradients:
    """``masked``: an activation's mask is made again, for which the bias is kept."""
    return nodes.Gradients(
        _BACKWARD,
        {"x": "grad_x", "weight": "sum_g_xhat", "bias": "sum_g"},
        needs={"need_x": ("x",), "need_vectors": ("weight", "bias")},
        fixed=fixed if masked else {**fixed, "bias": None},
    )


give_gradients(TABLE, NAME, _APPLY, _gradients(True), _gradients(False), _INSTEAD)
give_gradients(TABLE, _FORWARD_, None, _gradients(True, training=True), _gradients(False, training=True), _INSTEAD)

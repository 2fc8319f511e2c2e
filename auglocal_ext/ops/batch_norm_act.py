"""Batch normalisation, residual and activation as one op, and the four passes over the feature map it is made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import nodes, registry
from .batch_norm_checks import check_eps, check_map, check_tensors, slope_of, wide_dtype
from .batch_norm_passes import NAME, count_as_written, give_gradients, passes, refuse_stand_in, updatable
from .flags import not_a_flag
from .layout import empty_like
from .transforms import refuse_transforms

_INSTEAD = "F.batch_norm"


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    *,
    residual: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    activation: str = "relu",
    negative_slope: float = 0.01,
    provider: str | None = None,
) -> Tensor:
    """y = act((x - mean) / sqrt(var + eps) * weight + bias + residual), mean and var per channel.

    x (N, C) or (N, C, *positions) in float16, bfloat16, float32 or float64, any strides; weight and bias (C,) or None;
    residual of x's shape and dtype, or None; activation "relu", "leaky_relu" (``negative_slope``) or "none". Returns y
    in x's dtype, channels-last where x is. Weight, bias and running statistics are float32 or of x's dtype (float64
    for a double x); everything is accumulated in float32 (float64).

    training=True: mean and biased variance of x over images and positions, and where running statistics are given
    they are updated, r <- (1 - momentum) r + momentum s with s the mean and the unbiased variance. ``momentum`` is a
    factor: for a cumulative average pass 1 / number of batches. ``num_batches_tracked``, (), int64, is counted up.
    training=False: the running statistics are used.

    Equal to ``F.batch_norm``, ``+ residual`` and the activation, one rounding to x's dtype instead of three. Between
    forward and backward only x, the (C,) vectors and, where there is an activation, the caller's residual are held:
    backward makes the normalised value and the mask again. Differentiable once.

    Raises TypeError for a wrong dtype and for a ``training`` that is neither True nor False, ValueError for a wrong
    shape, device or option and, as torch does, for one value per channel in training, RuntimeError for a provider that
    is not available, NotImplementedError under ``torch.func`` and for tensors with a tangent of forward-mode AD.
    """
    if training is not True and training is not False:
        raise not_a_flag("training", training)
    if training and updatable(x, weight, bias, running_mean, running_var, residual, num_batches_tracked):
        written = running_mean, running_var, num_batches_tracked
        slope = slope_of(activation, negative_slope)
        check_eps(eps, training)
        recorded = passes(x, provider).recorded
        assert recorded is not None  # for want of a stand-in
        count_as_written(*written)
        return recorded(x, *written, weight, bias, residual, float(momentum), float(eps), slope)
    refuse_transforms(NAME, _INSTEAD, x, weight, bias, residual)
    vectors = {"weight": weight, "bias": bias, "running_mean": running_mean, "running_var": running_var}
    check_tensors(x, vectors, residual)
    slope = slope_of(activation, negative_slope)
    if training:
        refuse_stand_in(NAME)
    mean, rstd = batch_norm_factors(
        x,
        running_mean,
        running_var,
        num_batches_tracked,
        training=training,
        momentum=momentum,
        eps=eps,
        provider=provider,
    )
    return registry.run(registry.chosen(NAME, x, provider), x, mean, rstd, weight, bias, residual, slope, training)


def batch_norm_factors(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    provider: str | None = None,
) -> tuple[Tensor, Tensor]:
    """mean (C,) and rstd = 1 / sqrt(var + eps) (C,) that normalise x; in training the running statistics are updated.

    As in :func:`batch_norm_act`. Without running statistics nothing is updated, which a second run of the same
    forward pass (recomputation) needs. Not differentiable.
    """
    if training is not True and training is not False:
        raise not_a_flag("training", training)
    refuse_transforms("batch_norm_factors", _INSTEAD)
    check_eps(eps, training)
    if training:
        check_map(x)
        count_as_written(running_mean, running_var, num_batches_tracked)
    with torch.no_grad():
        return passes(x, provider).factors(
            x, running_mean, running_var, num_batches_tracked, training, float(momentum), float(eps)
        )


def batch_norm_stats(x: Tensor, *, provider: str | None = None) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over images and positions, each (C,) in float32 (float64 for a double x).

    Sums are taken of differences to a value of the channel, so that a mean far from zero costs no digits of the
    variance. Not differentiable, as the three functions below.
    """
    check_map(x)
    return registry.chosen(NAME, x, provider, "batch_norm_stats")(x)


def batch_norm_act_apply(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str = "relu",
    negative_slope: float = 0.01,
    *,
    provider: str | None = None,
) -> Tensor:
    """y = act((x - mean) rstd weight + bias + residual) in x's dtype, channels-last where x is."""
    slope = slope_of(activation, negative_slope)
    return registry.chosen(NAME, x, provider, "batch_norm_act_apply")(x, mean, rstd, weight, bias, residual, slope)


def batch_norm_act_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str = "relu",
    negative_slope: float = 0.01,
    *,
    provider: str | None = None,
) -> tuple[Tensor, Tensor]:
    """sum_g and sum_g_xhat (C,), the sums over images and positions of g = grad act'(...) and of g (x - mean) rstd.

    They are the gradients of bias and weight in float32 (float64). ``grad`` has x's shape and dtype and any strides:
    one expanded over the positions is read as it is. The argument of the activation is made again from x (and
    residual), with the same arithmetic as in the forward pass.
    """
    slope = slope_of(activation, negative_slope)
    return registry.chosen(NAME, x, provider, "batch_norm_act_reduce")(
        grad, x, mean, rstd, weight, bias, residual, slope
    )


def batch_norm_act_input_grad(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    negative_slope: float,
    sum_g: Tensor | None,
    sum_g_xhat: Tensor | None,
    training: bool,
    need_residual: bool,
    *,
    provider: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of the residual (None unless ``need_residual``), each laid out as x.

    grad_residual = g, which without an activation is ``grad`` itself; grad_x = weight rstd (g - (sum_g + xhat
    sum_g_xhat) / (N P)) in training, weight rstd g in eval mode, where the sums may be None.
    """
    slope = slope_of(activation, negative_slope)
    for name, flag in (("training", training), ("need_residual", need_residual)):
        if flag is not True and flag is not False:
            raise not_a_flag(name, flag)
    sums = (sum_g, sum_g_xhat) if training else (None, None)
    grads = registry.chosen(NAME, x, provider, "batch_norm_act_input_grad")(
        grad, x, mean, rstd, weight, bias, residual, slope, *sums, need_residual and slope != 1
    )
    return grads[0], None if not need_residual else grad if slope == 1 else grads[1]


def _fake_stats(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    mean = x.new_empty(x.shape[1], dtype=wide_dtype(x))
    return mean, torch.empty_like(mean)


def _fake_forward(x: Tensor, *_: Any) -> Tensor:
    return empty_like(x)


def _fake_reduce(grad: Tensor, x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _fake_stats(x)


def _fake_input_grad(grad: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    return empty_like(x), empty_like(x) if others[-1] else x.new_empty(0)


def _fake_forward_(x: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return empty_like(x), *_fake_stats(x)


def _fake_backward(grad: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
    *_, training, need_x, need_vectors, need_residual = others
    grads = _fake_input_grad(grad, x, need_residual) if need_x or need_residual else _nothing(x)
    return *grads, *(_fake_stats(x) if need_vectors or (training and need_x) else _nothing(x, wide_dtype(x)))


def _nothing(x: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    return x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)


def _forward_(
    provider: str,
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    momentum: float,
    eps: float,
    slope: float,
) -> tuple[Tensor, Tensor, Tensor]:
    factors_ = registry.overload("batch_norm_factors_", provider)
    mean, rstd = factors_(x, running_mean, running_var, num_batches_tracked, momentum, eps)
    return _forward(provider, x, mean, rstd, weight, bias, residual, slope, True), mean, rstd


def _backward(provider: str, *arguments: Any) -> tuple[Tensor, ...]:
    *tensors, training, need_x, need_vectors, need_residual = arguments
    x = tensors[1]
    through_statistics = training and need_x
    sums, grads = _nothing(x, wide_dtype(x)), _nothing(x)
    if through_statistics or need_vectors:
        sums = registry.overload("batch_norm_act_reduce", provider)(*tensors)
    if need_x or need_residual:  # where the residual's alone is needed, x's is made the cheapest way
        kept = sums if through_statistics else (None, None)
        grads = registry.overload("batch_norm_act_input_grad", provider)(*tensors, *kept, need_residual)
    return *grads, *sums


def _forward(provider: str, *arguments: Any) -> Tensor:
    return registry.overload("batch_norm_act_apply", provider)(*arguments[:-1])


TABLE = registry.table(NAME)

_FACTORS = "Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, Tensor? residual, float slope"

registry.primitive(TABLE, "batch_norm_stats", "(Tensor x) -> (Tensor mean, Tensor var)", _fake_stats, "stats")
registry.primitive(
    TABLE,
    "batch_norm_factors_",
    "(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "float momentum, float eps) -> (Tensor mean, Tensor rstd)",
    _fake_stats,
    "factors_",
)
registry.primitive(TABLE, "batch_norm_act_apply", f"(Tensor x, {_FACTORS}) -> Tensor", _fake_forward, "apply")
registry.primitive(
    TABLE,
    "batch_norm_act_reduce",
    f"(Tensor grad, Tensor x, {_FACTORS}) -> (Tensor sum_g, Tensor sum_g_xhat)",
    _fake_reduce,
    "reduce",
)
registry.primitive(
    TABLE,
    "batch_norm_act_input_grad",
    f"(Tensor grad, Tensor x, {_FACTORS}, Tensor? sum_g, Tensor? sum_g_xhat, bool need_residual) "
    "-> (Tensor grad_x, Tensor grad_residual)",
    _fake_input_grad,
    "input_grad",
)
registry.composite(
    TABLE,
    "batch_norm_act_forward_",
    "(Tensor x, Tensor(a!)? running_mean, Tensor(b!)? running_var, Tensor(c!)? num_batches_tracked, "
    "Tensor? weight, Tensor? bias, Tensor? residual, float momentum, float eps, float slope) "
    "-> (Tensor y, Tensor mean, Tensor rstd)",
    _fake_forward_,
    _forward_,
)
registry.composite(
    TABLE,
    "batch_norm_act_backward",
    f"(Tensor grad, Tensor x, {_FACTORS}, bool training, bool need_x, bool need_vectors, bool need_residual) "
    "-> (Tensor grad_x, Tensor grad_residual, Tensor sum_g, Tensor sum_g_xhat)",
    _fake_backward,
    _backward,
    aten="backward",
)
registry.composite(TABLE, NAME, f"(Tensor x, {_FACTORS}, bool training) -> Tensor", _fake_forward, _forward)


def _gradients(masked: bool, **fixed: Any) -> nodes.Gradients:
    """``masked``: an activation's mask is made again, for which bias and residual are kept."""
    return nodes.Gradients(
        "batch_norm_act_backward",
        {"x": "grad_x", "weight": "sum_g_xhat", "bias": "sum_g", "residual": "grad_residual" if masked else "grad"},
        needs={"need_x": ("x",), "need_vectors": ("weight", "bias"), "need_residual": ("residual",)},
        fixed=fixed if masked else {**fixed, "bias": None, "residual": None, "need_residual": False},
    )


give_gradients(TABLE, NAME, "batch_norm_act_apply", _gradients(True), _gradients(False), _INSTEAD)
give_gradients(
    *(TABLE, "batch_norm_act_forward_", None, _gradients(True, training=True), _gradients(False, training=True)),
    f"{_INSTEAD}, or in a fused module torch's own layers, which auglocal_ext.unfuse(module) puts back",
)

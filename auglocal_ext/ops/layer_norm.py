"""Layer normalisation (LayerNorm, RMSNorm) of a sum with a residual as one op, and the three passes it is made of."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from . import providers, registry
from .batch_norm_checks import cast_to, wide_dtype
from .flags import not_a_flag
from .transforms import refuse_transforms

NAME = "layer_norm"
_INSTEAD = "F.layer_norm or F.rms_norm"


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    rms: bool = False,
    provider: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y = (total - mean) / sqrt(var + eps) * weight + bias with total = x + residual, mean and var of each row.

    A row is what stands along the last dimension. With ``rms`` no mean is subtracted, and var is the mean square.
    Equal to ``F.layer_norm(total, (C,), weight, bias, eps)`` or ``F.rms_norm(total, (C,), weight, eps)``. Sums and
    statistics are float32 (float64 for a double x). Between forward and backward only the rows that are normalised (x;
    with a residual the sum, which the caller has anyway) and one or two numbers a row are stored. Differentiable once.
    Under autocast x keeps its dtype.

    Args:
        x: ``(..., C)`` in float16, bfloat16, float32 or float64, any strides.
        weight: ``(C,)`` in any of these dtypes, or None.
        bias: ``(C,)`` in any of these dtypes, or None; only beside a weight, and not for ``rms``.
        residual: of x's shape and dtype, or None.
        eps: added to the variance; at least 1.18e-38, float32's least normal number (for a double x float64's).
        rms: RMSNorm instead of LayerNorm.
        provider: None (automatic) or ``"reference"``, ``"aten"``, ``"cpu"``, ``"cuda"``, ``"triton"``.

    Returns:
        y, contiguous, in x's shape and dtype. With a residual ``(y, total)``, total rounded to x's dtype, which is what
        is normalised.

    Raises:
        TypeError: for a wrong dtype, and for an ``rms`` that is neither True nor False.
        ValueError: for a wrong shape, device or option.
        RuntimeError: for a provider that is not available.
        NotImplementedError: under ``torch.func``, and for inputs with a tangent of forward-mode AD.
    """
    refuse_transforms(NAME, _INSTEAD, x, residual, weight, bias)
    if not _fit(x, residual, weight, bias, eps, rms):
        check_tensors(x, residual, weight, bias, eps, rms)
    op = registry.chosen(NAME, x, provider)
    y, total, *_ = registry.run(op, x, residual, weight, bias, float(eps), rms)
    return y if residual is None else (y, total)


def check_tensors(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool
) -> None:
    """TypeError or ValueError for what :func:`layer_norm` does not take."""
    for name, tensor in (("x", x), ("residual", residual), ("weight", weight), ("bias", bias)):
        _check_kind(name, tensor)
    if x.dim() < 1 or 0 in x.shape:
        raise ValueError(f"expected x of shape (..., C) with elements, got {tuple(x.shape)}")
    if x.dtype not in providers.ALL:
        raise TypeError(f"expected x in float16, bfloat16, float32 or float64, got {x.dtype}")
    if rms is not True and rms is not False:
        raise not_a_flag("rms", rms)
    if eps is None or isinstance(eps, str):
        raise TypeError(f"expected eps as a number, got {eps!r}")
    if not least_eps(x.dtype) <= eps < math.inf:
        raise ValueError(f"expected a positive eps, for {x.dtype} of at least {least_eps(x.dtype):.3g}, got {eps}")
    if bias is not None and (rms or weight is None):
        raise ValueError(
            "expected no bias for rms; RMSNorm has none"
            if rms
            else "expected a weight beside the bias, got None; pass ones for a bias alone"
        )
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        if vector.shape != x.shape[-1:]:
            raise ValueError(
                f"expected {name} of shape ({x.shape[-1]},) for x {tuple(x.shape)}, got {tuple(vector.shape)}"
            )
        if vector.dtype not in providers.ALL:
            raise TypeError(f"expected {name} in float16, bfloat16, float32 or float64, got {vector.dtype}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise (ValueError if residual.dtype == x.dtype else TypeError)(
            f"expected residual {tuple(x.shape)} in {x.dtype} as x, got {tuple(residual.shape)} in {residual.dtype}"
        )
    for name, tensor in (("residual", residual), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"expected {name} on {x.device} as x, got it on {tensor.device}; move it with .to(x.device)"
            )


def _fit(x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool) -> bool:
    """Whether the plainest tensors are to be normalised, of which :func:`check_tensors` has nothing to say.

    Asked at every call, and several times as fast.
    """
    if type(eps) is not float or not 1e-37 < eps < 1 or not isinstance(x, Tensor):
        return False
    if rms is not True and rms is not False:
        return False
    shape, dtype, device = x.shape, x.dtype, x.device
    if not shape or 0 in shape or dtype not in providers.ALL or x.layout is not torch.strided:
        return False
    for vector in (weight, bias):
        if vector is not None:
            if not isinstance(vector, Tensor) or vector.shape != shape[-1:] or vector.device != device:
                return False
            if vector.dtype not in providers.ALL or vector.layout is not torch.strided:
                return False
    if bias is not None and (rms or weight is None):
        return False
    if residual is None:
        return True
    if not isinstance(residual, Tensor) or residual.layout is not torch.strided:
        return False
    return residual.shape == shape and residual.dtype is dtype and residual.device == device


def _check_kind(name: str, tensor: Tensor | None) -> None:
    if tensor is None and name != "x":
        return
    if not isinstance(tensor, Tensor):
        hint = "; the normalised shape is that of the last dimension, leave it out" if name == "weight" else ""
        raise TypeError(f"expected {name} as a tensor, got {type(tensor).__name__}{hint}")
    if tensor.layout is not torch.strided:
        raise TypeError(f"expected {name} as a dense tensor, got one of layout {tensor.layout}")


def least_eps(dtype: torch.dtype) -> float:
    """The least eps for x of this dtype: a normal number in the dtype of the statistics, which a smaller one is not."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny


def rows(x: Tensor) -> Tensor:
    """x as contiguous rows (R, C)."""
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    return x if x.is_contiguous() else x.contiguous()


def _fake_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions = x.shape[:-1].numel()
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if residual is None else x.shape),
        x.new_empty(0 if rms else positions, dtype=wide_dtype(x)),
        x.new_empty(positions, dtype=wide_dtype(x)),
    )


def _fake_apply(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(grad: Tensor, grad_total: Tensor | None, x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_x, need_weight, need_bias = others
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(x.shape[1] if need_weight else 0, dtype=wide_dtype(x)),
        x.new_empty(x.shape[1] if need_bias else 0, dtype=wide_dtype(x)),
    )


def _forward(
    provider: str,
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    forward = registry.kernel("layer_norm_forward", provider)
    added = None if residual is None else rows(residual)
    y, total, mean, rstd = forward(rows(x), added, _contiguous(weight), _contiguous(bias), eps, rms)
    if x.dim() != 2:  # in place, for what is a view may not be changed where autograd's node is our own
        y.resize_(x.shape)
        if residual is not None:
            total.resize_(x.shape)
    return y, total, mean, rstd


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return vector if vector is None or vector.is_contiguous() else vector.contiguous()


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, bias, _, ctx.rms = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*((total,) if residual is None else ()), mean, rstd)
    ctx.dtypes = None if weight is None else weight.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(x if residual is None else total, mean, rstd, weight)


def _backward(provider: str, ctx: Any, grad: Tensor | None, grad_total: Tensor | None, *_: None) -> tuple[Any, ...]:
    if grad is None:  # total alone is used
        return grad_total, grad_total, None, None, None, None
    x, mean, rstd, weight = ctx.saved_tensors
    need_x, need_residual, need_weight, need_bias, *_ = ctx.needs_input_grad
    need_rows = need_x or need_residual
    grad_x, grad_weight, grad_bias = registry.kernel("layer_norm_backward", provider)(
        rows(grad),
        None if grad_total is None else rows(grad_total),
        *(rows(x), mean, rstd, _contiguous(weight), ctx.rms, need_rows, need_weight, need_bias),
    )
    if need_rows and x.dim() != 2:
        grad_x = grad_x.view(x.shape)
    return (
        grad_x if need_x else None,
        grad_x if need_residual else None,
        cast_to(ctx.dtypes[0], grad_weight) if need_weight else None,
        cast_to(ctx.dtypes[1], grad_bias) if need_bias else None,
        None,
        None,
    )


TABLE = registry.table(NAME)

_FORWARD = (
    "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, bool rms) "
    "-> (Tensor y, Tensor total, Tensor mean, Tensor rstd)"
)

registry.primitive(TABLE, "layer_norm_forward", _FORWARD, _fake_forward, "forward")
registry.primitive(
    TABLE,
    "layer_norm_apply",
    "(Tensor x, Tensor mean, Tensor rstd, Tensor? weight, Tensor? bias, bool rms) -> Tensor y",
    _fake_apply,
    "apply",
)
registry.primitive(
    TABLE,
    "layer_norm_backward",
    "(Tensor grad, Tensor? grad_total, Tensor x, Tensor mean, Tensor rstd, Tensor? weight, bool rms, bool need_x, "
    "bool need_weight, bool need_bias) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _fake_backward,
    "backward",
)
registry.composite(TABLE, NAME, _FORWARD, _fake_forward, _forward)
registry.autograd(TABLE, _backward, _setup_context, instead=_INSTEAD, results=2, composed=_forward)

"""Layer normalisation (LayerNorm, RMSNorm) of a sum with a residual as one op, and the three passes it is made of."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from . import nodes, providers, registry, tuning
from .batch_norm_checks import wide_dtype
from .flags import not_a_flag
from .known_calls import KnownCalls
from .transforms import refuse_transforms, transforms_active

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
    compiling = torch.compiler.is_compiling()
    if compiling or transforms_active():
        refuse_transforms(NAME, _INSTEAD, x, residual, weight, bias)
    else:
        known: Tensor | tuple[Tensor, Tensor] | None = _CALLS.again(
            *(provider, providers.asked(), tuning.generation, x, residual, weight, bias, eps, rms)
        )
        if known is not None:
            return known
    check_tensors(x, residual, weight, bias, eps, rms)
    op = registry.chosen(NAME, x, provider)
    if compiling:
        y, total, *_ = op(x, residual, weight, bias, float(eps), rms)
        return y if residual is None else (y, total)
    made: Tensor | tuple[Tensor, Tensor] = _CALLS.run(op, provider, x, residual, weight, bias, float(eps), rms)
    return made


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
    if not least_eps(x.dtype) <= eps <= sys.float_info.max:
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


def _check_kind(name: str, tensor: Tensor | None) -> None:
    if tensor is None and name != "x":
        return
    if not isinstance(tensor, Tensor):
        hint = "; the normalised shape is that of the last dimension, leave it out" if name == "weight" else ""
        raise TypeError(f"expected {name} as a tensor, got {type(tensor).__name__}{hint}")
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested one" if tensor.is_nested else f"one of layout {tensor.layout}"
        raise TypeError(f"expected {name} as a dense tensor, got {kind}")


def least_eps(dtype: torch.dtype) -> float:
    """The least eps for x of this dtype: a normal number in the dtype of the statistics, which a smaller one is not."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny


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
    return x.new_empty(x.shape)


def _fake_backward(grad: Tensor, grad_total: Tensor | None, x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, need_x, need_weight, need_bias = others
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(x.shape[-1] if need_weight else 0, dtype=wide_dtype(x)),
        x.new_empty(x.shape[-1] if need_bias else 0, dtype=wide_dtype(x)),
    )


def _forward(provider: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return registry.overload("layer_norm_forward", provider)(*arguments)


TABLE = registry.table(NAME)
_CALLS = KnownCalls(NAME)

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
_ALONE = nodes.Gradients(
    "layer_norm_backward",
    {"x": "grad_x", "weight": "grad_weight", "bias": "grad_bias"},
    needs={"need_x": ("x",), "need_weight": ("weight",), "need_bias": ("bias",)},
    fixed={"grad_total": None},
)
_WITH_RESIDUAL = nodes.Gradients(
    "layer_norm_backward",
    {"x": "grad_x", "residual": "grad_x", "weight": "grad_weight", "bias": "grad_bias"},
    incoming=("grad", "grad_total"),
    needs={"need_x": ("x", "residual"), "need_weight": ("weight",), "need_bias": ("bias",)},
    renamed={"x": "total"},
    alone={"x": "grad_total", "residual": "grad_total"},
)
nodes.autograd(
    TABLE,
    (_ALONE, _WITH_RESIDUAL),
    lambda inputs: inputs[1] is not None,
    instead=_INSTEAD,
    name=NAME,
    primitive="layer_norm_forward",
)

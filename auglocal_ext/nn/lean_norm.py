"""LayerNorm and RMSNorm whose output the linear layers after it make again in backward."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import providers, registry, tuning
from ..ops.batch_norm_checks import cast_to
from ..ops.layer_norm import NAME
from .norm_act import PLAIN
from .remade import Remake, Source, autocasts, recordable


class NormPasses(NamedTuple):
    """The passes of ``layer_norm`` by the provider that was chosen for these maps."""

    forward: Any
    apply: Any
    backward: Any


def norm_passes(x: Tensor) -> NormPasses:
    """The passes over maps as x; the choice is made once for each form."""
    form = (x.shape, x.stride()) if type(x) in tuning.PLAIN else None
    key = "norm_passes", form, x.dtype, x.device, providers.asked()
    found = tuning.lookups.get(key)
    if found is None:
        picked, settled = tuning.pick(NAME, x, None)
        found = NormPasses(*(registry.overload(f"{NAME}_{name}", picked) for name in ("forward", "apply", "backward")))
        if settled:
            tuning.remember(key, found)
    return found


def lean_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, rms: bool, dtype: torch.dtype
) -> Tensor:
    """``ops.layer_norm`` of ``x``, converted to ``dtype``, with a source; x (..., C) that is recordable."""
    source = Source(cast(Remake, _again), (None,))  # the forward pass completes it
    y: Tensor = _LeanNorm.apply(x, weight, bias, (eps, rms, dtype, source))
    return source.note(y) if y.requires_grad else y


def _again(tensors: Sequence[Any], passes: NormPasses, rms: bool, dtype: torch.dtype) -> Tensor:
    x, mean, rstd, weight, bias = tensors
    y: Tensor = passes.apply(cast_to(dtype, x), mean, rstd, weight, bias, rms)
    return y


class _LeanNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        options: tuple[float, bool, torch.dtype, Source],
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        eps, rms, dtype, source = options
        cast = cast_to(dtype, x)
        y: Tensor
        passes = norm_passes(cast)
        y, _, mean, rstd = passes.forward(cast, None, weight, bias, eps, rms)
        source.remake = partial(_again, passes=passes, rms=rms, dtype=dtype)
        source.tensors = x, mean, rstd, weight, bias
        ctx.source = weakref.ref(source)  # whose tensors live no longer than the output and what is saved
        ctx.once = source.once
        ctx.options = passes, rms, dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x, mean, rstd, weight)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            registry.refuse_create_graph("a fused LayerNorm or RMSNorm", PLAIN)
        ctx.once.drop()
        if (source := ctx.source()) is not None:
            source.tensors = ()
        if grad is None:
            return (None,) * 4
        passes, rms, dtype, bias_dtype = ctx.options
        x, mean, rstd, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grad_x, grad_weight, grad_bias = passes.backward(
            *(grad, None, cast_to(dtype, x), mean, rstd, weight, rms, need_x, need_weight, need_bias)
        )
        return (
            cast_to(x.dtype, grad_x) if need_x else None,
            cast_to(weight.dtype, grad_weight) if need_weight else None,
            cast_to(bias_dtype, grad_bias) if need_bias else None,
            None,
        )


_dtypes: dict[tuple[Any, ...], torch.dtype | None] = {}


def result_dtype(x: Tensor, weight: Tensor | None, bias: Tensor | None, rms: bool) -> torch.dtype | None:
    """The dtype of what torch's layer returns for ``x`` here, autocast included; None where it refuses the dtypes."""
    device = x.device.type
    autocast = autocasts(device)
    vectors = None if weight is None else weight.dtype, None if bias is None else bias.dtype
    if not autocast and vectors[0] in (None, x.dtype) and vectors[1] in (None, x.dtype):
        return x.dtype
    key = x.dtype, *vectors, x.device, autocast and torch.get_autocast_dtype(device), rms
    if key not in _dtypes:
        _dtypes[key] = _tried(x, vectors, rms)
    return _dtypes[key]


def _tried(x: Tensor, vectors: Sequence[torch.dtype | None], rms: bool) -> torch.dtype | None:
    """Asked of torch itself: autocast's lists differ between devices and versions."""
    row = torch.zeros(1, 8, dtype=x.dtype, device=x.device)
    weight, bias = (None if dtype is None else row.new_zeros(8, dtype=dtype) for dtype in vectors)
    try:
        with torch.no_grad():
            return (F.rms_norm(row, (8,), weight) if rms else F.layer_norm(row, (8,), weight, bias)).dtype
    except RuntimeError:
        return None


def lean_layer_norm(norm: Any, x: Tensor, rms: bool = False) -> Tensor | None:
    """What the layer makes of ``x`` with a node of our own; None where it must run as it is."""
    weight, bias = norm.weight, None if rms else norm.bias
    if not recordable(x, weight, bias) or tuple(norm.normalized_shape) != x.shape[-1:]:
        return None
    eps = norm.eps
    if eps is None and x.dtype in (torch.float32, torch.float64):  # of narrower ones versions of torch differ
        eps = torch.finfo(x.dtype).eps
    if eps is None or not eps > 0 or x.dtype not in providers.ALL:
        return None
    needed = x.requires_grad
    for vector in (weight, bias):
        if vector is not None:
            needed = needed or vector.requires_grad
            if vector.device != x.device or vector.shape != x.shape[-1:]:
                return None  # which torch refuses
    if not needed or (weight is None and bias is not None):
        return None
    dtype = result_dtype(x, weight, bias, rms)
    if dtype is None:
        return None
    return lean_norm(x, weight, bias, float(eps), rms, dtype)


def norm_refusal(norm: nn.Module) -> str | None:
    """Why a LayerNorm or RMSNorm stays eager."""
    axes = len(norm.normalized_shape)  # type: ignore[arg-type]
    return None if axes == 1 else f"normalises over {axes} axes"


class FusedLayerNorm(nn.LayerNorm):
    """An ``nn.LayerNorm`` that :func:`auglocal_ext.fuse` has changed."""

    def forward(self, input: Tensor) -> Tensor:
        y = lean_layer_norm(self, input) if type(self) is FusedLayerNorm else None
        return super().forward(input) if y is None else y


class FusedRMSNorm(nn.RMSNorm):
    """An ``nn.RMSNorm`` that :func:`auglocal_ext.fuse` has changed."""

    def forward(self, x: Tensor) -> Tensor:
        y = lean_layer_norm(self, x, rms=True) if type(self) is FusedRMSNorm else None
        return super().forward(x) if y is None else y

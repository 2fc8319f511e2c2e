"""The end of a residual block whose shortcut is normalised too, kept as its two raw maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import batch_norm_factors
from ..ops.registry import refuse_create_graph
from .norm_act_conv import PLAIN, Factors, Norm, check_vectors, input_grads, normalised


class Branch(NamedTuple):
    """A raw map and the normalisation it gets: arguments of :func:`auglocal_ext.ops.batch_norm_act`."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    training: bool
    momentum: float
    eps: float


def norm_shortcut_act(
    main: Branch,
    shortcut: Branch,
    *,
    activation: str = "relu",
    negative_slope: float = 0.01,
    provider: str | None = None,
) -> Tensor:
    """act(bn(main) + bn(shortcut)): of the maps only the two raw ones are kept.

    Both x (N, C, *positions) of one shape and dtype, any strides; returns that dtype. The shortcut's normalised map
    lives while it is added, and again while backward makes the gradients of the main branch. Differentiable once.

    Raises ValueError where the two branches or their vectors do not fit each other, RuntimeError for
    ``create_graph=True``.
    """
    if main.x.shape != shortcut.x.shape or main.x.dtype != shortcut.x.dtype:
        raise ValueError(
            f"expected two maps of one shape and dtype, got {tuple(main.x.shape)} in {main.x.dtype} and "
            f"{tuple(shortcut.x.shape)} in {shortcut.x.dtype}"
        )
    tensors: list[Tensor | None] = []
    for x, weight, bias, mean, var, training, momentum, eps in (main, shortcut):
        check_vectors(x, weight, bias, mean, var)
        factors = batch_norm_factors(
            x.detach(), mean, var, training=training, momentum=momentum, eps=eps, provider=provider
        )
        tensors += [x, *factors, weight, bias]
    ends = Norm(activation, negative_slope, main.training, provider), Norm("none", 0, shortcut.training, provider)
    return _NormShortcutAct.apply(*tensors, *ends)


class _NormShortcutAct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, ctx.main, ctx.shortcut = arguments
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        residual = normalised(_factors(tensors[5:], None), ctx.shortcut)
        return normalised(_factors(tensors[:5], residual), ctx.main)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_create_graph("norm_shortcut_act", PLAIN)
        grads: list[Tensor | None] = [None] * 12
        if grad is None:
            return tuple(grads)
        saved = ctx.saved_tensors
        main, shortcut = saved[:5], _factors(saved[5:], None)
        need = [(ctx.needs_input_grad[at], *ctx.needs_input_grad[at + 3 : at + 5]) for at in (0, 5)]
        residual = normalised(shortcut, ctx.shortcut)
        grads[0], grads[3], grads[4], grad = input_grads(
            grad, _factors(main, residual), ctx.main, (*need[0], any(need[1]))
        )
        del residual
        if grad is not None:
            grads[5], grads[8], grads[9], _ = input_grads(grad, shortcut, ctx.shortcut, (*need[1], False))
        return tuple(grads)


def _factors(tensors: Sequence[Any], residual: Tensor | None) -> Factors:
    x, mean, rstd, weight, bias = tensors
    return x, mean, rstd, weight, bias, residual

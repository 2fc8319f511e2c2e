"""The end of a residual block whose shortcut is normalised too, kept as its two raw maps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.batch_norm_checks import check_eps, check_map, slope_of
from ..ops.batch_norm_passes import Passes, passes
from ..ops.registry import refuse_create_graph
from ..ops.transforms import refuse_transforms
from .fusable import NormCall
from .norm_act import PLAIN, count_as_updated, factors, input_grads, normalised


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
    num_batches_tracked: Tensor | None = None

    @property
    def norm(self) -> NormCall:
        """The normalisation alone."""
        _, weight, bias, mean, var, training, momentum, eps, batches = self
        return weight, bias, mean, var, batches, training, float(momentum), float(eps), None


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
    ``create_graph=True``, NotImplementedError under ``torch.func`` and for tensors with a tangent of forward-mode AD.
    """
    refuse_transforms("norm_shortcut_act", PLAIN, *main[:3], *shortcut[:3])
    if main.x.shape != shortcut.x.shape or main.x.dtype != shortcut.x.dtype:
        raise ValueError(
            f"expected two maps of one shape and dtype, got {tuple(main.x.shape)} in {main.x.dtype} and "
            f"{tuple(shortcut.x.shape)} in {shortcut.x.dtype}"
        )
    check_map(main.x)
    for branch in (main, shortcut):
        check_eps(branch.eps, branch.training)
    slope = slope_of(activation, negative_slope)
    count_as_updated([main.norm, shortcut.norm])
    return norm_shortcut_act_call(passes(main.x, provider), main.x, main.norm, shortcut.x, shortcut.norm, slope)


def norm_shortcut_act_call(
    run: Passes, x: Tensor, norm: NormCall, shortcut: Tensor, shortcut_norm: NormCall, slope: float
) -> Tensor:
    """:func:`norm_shortcut_act` of maps of one shape and dtype with elements, as modules call it."""
    return _NormShortcutAct.apply(x, *norm[:2], shortcut, *shortcut_norm[:2], run, slope, norm, shortcut_norm)


class _NormShortcutAct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        shortcut: Tensor,
        shortcut_weight: Tensor | None,
        shortcut_bias: Tensor | None,
        run: Passes,
        slope: float,
        norm: NormCall,
        shortcut_norm: NormCall,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.main, ctx.shortcut = (run, slope, norm[5]), (run, 1.0, shortcut_norm[5])
        main = x, *factors(run, x, norm), weight, bias
        residual, *shortcut_factors = normalised(run, shortcut, shortcut_norm, 1.0, None)
        ctx.save_for_backward(*main, shortcut, *shortcut_factors, shortcut_weight, shortcut_bias)
        return run.apply(*main, residual, slope)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_create_graph("norm_shortcut_act", PLAIN)
        grads: list[Tensor | None] = [None] * 10
        if grad is None:
            return tuple(grads)
        saved = ctx.saved_tensors
        main, shortcut = saved[:5], (*saved[5:], None)
        need = ctx.needs_input_grad[:3], ctx.needs_input_grad[3:6]
        residual = ctx.main[0].apply(*shortcut, 1.0)
        *grads[:3], grad = input_grads(grad, (*main, residual), ctx.main, (*need[0], any(need[1])))
        del residual
        if grad is not None:
            *grads[3:6], _ = input_grads(grad, shortcut, ctx.shortcut, (*need[1], False))
        return tuple(grads)

"""BatchNorm over the batches of several processes: statistics merged from counts, means and squared deviations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from .._torch import BatchNormBase
from ..ops.batch_norm_checks import slope_of
from ..ops.batch_norm_passes import Passes, passes, stand_in, standing_in
from .batch_norm_act import BatchNormAct1d, BatchNormAct2d
from .fusable import FUSABLE_NORMS, must_be_eager, norm_call
from .norm_act import count_as_updated, norm_act_call
from .waiting import waiting_for


class _Synced:
    """A BatchNorm layer that within :func:`synced_statistics` normalises by the statistics of all processes."""

    def forward(self, input: Tensor, *residual: Any, **options: Any) -> Any:
        layer, x = cast(Any, self), input
        norm = norm_call(layer)
        if stand_in() is None or not norm[5]:
            return super().forward(x, *residual, **options)  # type: ignore[misc]
        if must_be_eager(x):
            raise RuntimeError(
                f"{type(self).__name__} cannot merge its statistics over processes in a compiled, traced or "
                f"transformed forward pass, nor those of an empty batch; got x {tuple(x.shape)}. Leave such layers "
                "uncompiled, or sync_batch_norm out"
            )
        layer._check_input_dim(x)
        count_as_updated([norm])
        if isinstance(self, BatchNormAct2d):
            slope = slope_of(self.activation, self.negative_slope)
            return norm_act_call(passes(x), x, norm, slope, *residual, **options)
        return norm_act_call(passes(x), x, norm, 1.0)


class SyncedBatchNorm1d(_Synced, nn.BatchNorm1d):
    """``nn.BatchNorm1d`` that :func:`sync_batch_norm` has changed."""


class SyncedBatchNorm2d(_Synced, nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that :func:`sync_batch_norm` has changed."""


class SyncedBatchNorm3d(_Synced, nn.BatchNorm3d):
    """``nn.BatchNorm3d`` that :func:`sync_batch_norm` has changed."""


class SyncedBatchNormAct1d(_Synced, BatchNormAct1d):  # type: ignore[misc]
    """:class:`BatchNormAct1d` that :func:`sync_batch_norm` has changed."""


class SyncedBatchNormAct2d(_Synced, BatchNormAct2d):  # type: ignore[misc]
    """:class:`BatchNormAct2d` that :func:`sync_batch_norm` has changed."""


FUSABLE_NORMS.add(SyncedBatchNorm2d)

_SYNCED: dict[type, type] = {
    nn.BatchNorm1d: SyncedBatchNorm1d,
    nn.BatchNorm2d: SyncedBatchNorm2d,
    nn.BatchNorm3d: SyncedBatchNorm3d,
    BatchNormAct1d: SyncedBatchNormAct1d,
    BatchNormAct2d: SyncedBatchNormAct2d,
}


def sync_batch_norm(module: nn.Module) -> int:
    """Change the class of every BatchNorm in ``module``; outside :func:`synced_statistics` nothing else changes.

    Returns:
        How many there are.

    Raises:
        ValueError: for a normalisation over the batch of another kind, which would keep a process's own statistics.
    """
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, BatchNormBase)]
    for name, layer in layers:
        if type(layer) not in _SYNCED and not isinstance(layer, _Synced):
            raise ValueError(
                f"{name} is of type {type(layer).__name__}, whose statistics cannot be merged over processes; known "
                f"are {', '.join(kind.__name__ for kind in _SYNCED)}"
            )
    for _, layer in layers:
        layer.__class__ = _SYNCED.get(type(layer), type(layer))
    return len(layers)


def unsync_batch_norm(module: nn.Module) -> None:
    """Take :func:`sync_batch_norm` back, in place."""
    plain = {synced: kind for kind, synced in _SYNCED.items()}
    for layer in module.modules():
        layer.__class__ = plain.get(type(layer), type(layer))


@contextmanager
def synced_statistics(group: Any, where: str = "") -> Iterator[None]:
    """Within it layers changed by :func:`sync_batch_norm` use the statistics of all processes of ``group``.

    Every process of the group must run the same layers in the same order, backward passes included. ``F.batch_norm``
    called by itself in training raises NotImplementedError. ``where`` names this process in messages.
    """
    made: dict[Passes, Passes] = {}

    def synced(run: Passes) -> Passes:
        if run not in made:
            made[run] = _synced_passes(run, group, where)
        return made[run]

    with standing_in(synced), _NoFunctional():
        yield


class _NoFunctional(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.batch_norm and (kwargs.get("training") or (len(args) > 5 and args[5])):
            raise NotImplementedError(
                "F.batch_norm takes the statistics of this process alone; use nn.BatchNorm layers, or leave "
                "sync_batch_norm out"
            )
        return func(*args, **kwargs)


def _synced_passes(run: Passes, group: Any, where: str) -> Passes:
    processes = torch.distributed.get_world_size(group)

    def merged(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, sum of squared deviations and count over all processes, in float64."""
        mean, var = run.stats(x)
        channels, count = x.shape[1], x.numel() // x.shape[1]
        own = torch.cat([mean, var * count, mean.new_full((1,), count)]).double()
        everyone = [torch.empty_like(own) for _ in range(processes)]
        with waiting_for("the statistics of a BatchNorm layer were not merged", where):
            torch.distributed.all_gather(everyone, own, group=group)
        means, squares, counts = torch.stack(everyone).split([channels, channels, 1], dim=1)
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        return mean, (squares + counts * (means - mean).square()).sum(0), total

    def stats(x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("statistics that are merged come with factors")

    def factors_(
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        batches: Tensor | None,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        mean, squares, total = merged(x)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        if running_var is not None:
            running_var.lerp_((squares / (total - 1)).to(running_var.dtype), momentum)
        if batches is not None:
            batches.add_(1)
        return mean.to(run.wide), (squares / total + eps).rsqrt().to(run.wide)

    def forward_(
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        batches: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        momentum: float,
        eps: float,
        slope: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean, rstd = factors_(x, running_mean, running_var, batches, momentum, eps)
        return run.apply(x, mean, rstd, weight, bias, residual, slope), mean, rstd

    def backward(grad: Tensor, x: Tensor, *others: Any) -> tuple[Tensor, ...]:
        *tensors, training, need_x, need_vectors, need_residual = others
        if not training:
            return run.backward(grad, x, *others)
        none = x.new_empty(0)
        sum_g, sum_g_xhat = run.reduce(grad, x, *tensors) if need_x or need_vectors else (none, none)
        if not need_x:  # the sums of this process are the gradients of its weight and bias
            grads = run.input_grad(grad, x, *tensors, None, None, True) if need_residual else (none, none)
            return *grads, sum_g, sum_g_xhat
        count = x.numel() // x.shape[1]
        sums = torch.cat([sum_g, sum_g_xhat, sum_g.new_full((1,), count)]).double()
        with waiting_for("the gradients of a BatchNorm layer's statistics were not summed", where):
            torch.distributed.all_reduce(sums, group=group)
        # The pass divides by this process's count.
        whole = (sums[:-1] * (count / sums[-1])).to(run.wide).chunk(2)
        return *run.input_grad(grad, x, *tensors, *whole, need_residual), sum_g, sum_g_xhat

    own = {"factors_": factors_, "stats": stats, "forward_": forward_, "backward": backward, "recorded": None}
    return SyncedPasses(**{**run._asdict(), **own})


class SyncedPasses(Passes):
    """Passes whose statistics and whose sums in backward are those of all processes."""

    def factors(
        self,
        x: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor]:
        if not training:
            return super().factors(x, running_mean, running_var, num_batches_tracked, training, momentum, eps)
        return self.factors_(x, running_mean, running_var, num_batches_tracked, momentum, eps)

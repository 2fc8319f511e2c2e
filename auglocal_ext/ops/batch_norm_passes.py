"""The passes over a feature map that BatchNorm is made of, chosen once for maps of a device and dtype.

Modules that run several of them in one autograd node take them from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import schema, transforms_active
from . import nodes, providers, registry, tuning
from .batch_norm_checks import wide_dtype

NAME = "batch_norm_act"


class Passes(NamedTuple):
    """What runs on maps of one device and dtype: a provider's passes, as overloads, and whether autocast may cast.

    ``recorded`` is ``forward_`` with a node for backward and returns y alone. It is None in compiled code and where the
    statistics are not those of this process alone.
    """

    provider: str
    factors_: Any
    stats: Any
    apply: Any
    reduce: Any
    input_grad: Any
    forward_: Any
    backward: Any
    recorded: Callable[..., Tensor] | None
    dtype: torch.dtype
    wide: torch.dtype
    autocasts: str | None

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
        """``batch_norm_factors`` of an x with elements that needs no gradient, without ``count_as_written``."""
        wide, batches = self.wide, num_batches_tracked
        if not training:
            if running_mean is None or running_var is None:
                raise ValueError("expected running_mean and running_var for training=False; pass them or training=True")
            return running_mean.to(wide), running_var.to(wide).add(eps).rsqrt_()
        count = x.numel() // x.shape[1]
        if count == 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")
        if batches is not None and (batches.dtype is not torch.int64 or batches.device != x.device):
            batches.add_(1)
            batches = None
        if (running_mean is None or running_mean.dtype is wide and running_mean.is_contiguous()) and (
            running_var is None or running_var.dtype is wide and running_var.is_contiguous()
        ):
            return self.factors_(x, running_mean, running_var, batches, momentum, eps)
        mean, var = self.stats(x)
        if running_mean is not None:
            running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
        if running_var is not None:
            running_var.mul_(1 - momentum).add_(var, alpha=momentum * count / (count - 1))
        if batches is not None:
            batches.add_(1)
        return mean, var.add_(eps).rsqrt_()

    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype autocast makes ``F.conv2d`` compute in; None where it is off or, as for float64, leaves x alone."""
        device = self.autocasts
        return torch.get_autocast_dtype(device) if device and torch.is_autocast_enabled(device) else None


def updatable(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> bool:
    """Whether a batch can be normalised by one op that also writes the running statistics.

    True only where nothing is to be refused or explained either. Asked at every call, hence in one function: between
    operators, whose code displaces Python's in the caches, each call of a function takes several times as long as in a
    loop of its own.
    """
    if torch.compiler.is_compiling() or _stand_in is not None or transforms_active():
        return False
    shape, dtype, device = x.shape, x.dtype, x.device
    if len(shape) < 2 or dtype not in providers.ALL or not x.numel() > shape[1]:
        return False
    channels, wide = shape[1:2], torch.float64 if dtype is torch.float64 else torch.float32
    for vector in (weight, bias):
        if vector is not None:
            if not (vector.dtype is wide or vector.dtype is dtype) or vector.shape != channels:
                return False
            if vector.device != device:
                return False
    for running in (running_mean, running_var):
        if running is not None:
            if running.dtype is not wide or running.shape != channels or not running.is_contiguous():
                return False
            if running.device != device:
                return False
    if num_batches_tracked is not None:
        if num_batches_tracked.dtype is not torch.int64 or num_batches_tracked.device != device:
            return False
    return residual is None or residual.shape == shape and residual.dtype is dtype and residual.device == device


_stand_in: Callable[[Passes], Passes] | None = None


def stand_in() -> Callable[[Passes], Passes] | None:
    """What :func:`standing_in` was entered with; None outside."""
    return _stand_in


@contextmanager
def standing_in(made: Callable[[Passes], Passes]) -> Iterator[None]:
    """Within it :func:`passes` returns ``made(passes)``, in all threads: recomputation may run in autograd's."""
    global _stand_in
    before, _stand_in = _stand_in, made
    try:
        yield
    finally:
        _stand_in = before


def refuse_stand_in(op: str) -> None:
    """NotImplementedError within :func:`standing_in`, for an op that has passes of its own."""
    if _stand_in is not None:
        raise NotImplementedError(
            f"{op} takes the statistics of this process alone, and sync_batch_norm=True asks for those of all; use "
            "nn.BatchNorm2d or BatchNormAct2d layers in place of the op"
        )


def passes(x: Tensor, provider: str | None = None) -> Passes:
    """The passes over maps as x; the choice is made once for each form of maps and provider asked for."""
    if torch.compiler.is_compiling():
        return _of(providers.choose(NAME, x.device, x.dtype, provider), x)
    form = (x.shape, x.stride()) if type(x) in tuning.PLAIN else None
    key = form, x.dtype, x.device, provider, providers.asked()
    found = tuning.lookups.get(key)
    if found is None:
        picked, settled = tuning.pick(NAME, x, provider)
        found = _of(picked, x)
        if settled:
            tuning.remember(key, found)
    return found if _stand_in is None else _stand_in(found)


def _of(provider: str, x: Tensor) -> Passes:
    def op(name: str) -> Any:
        return registry.overload(name, provider)

    device = x.device.type
    # Of these two it is known; the compiler of torch 2.11 cannot ask.
    may_cast = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return Passes(
        provider,
        op("batch_norm_factors_"),
        op("batch_norm_stats"),
        op("batch_norm_act_apply"),
        op("batch_norm_act_reduce"),
        op("batch_norm_act_input_grad"),
        op("batch_norm_act_forward_"),
        op("batch_norm_act_backward"),
        None if torch.compiler.is_compiling() else registry.recorder(op("batch_norm_act_forward_")),
        x.dtype,
        wide_dtype(x),
        device if may_cast and x.dtype != torch.float64 else None,
    )


def count_as_written(*tensors: Tensor | None) -> None:
    """Tell autograd that ops will write to these tensors; custom ops do not do so themselves."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([tensor for tensor in tensors if tensor is not None])


def give_gradients(
    table: providers.Table,
    name: str,
    primitive: str | None,
    masked: nodes.Gradients,
    linear: nodes.Gradients,
    instead: str,
) -> None:
    """``nodes.autograd`` for an op with an activation: ``masked``, or ``linear`` where the slope is 1."""
    slope = [each.name for each in schema(registry.overload(name, "reference")).arguments].index("slope")
    nodes.autograd(table, (masked, linear), lambda inputs: inputs[slope] == 1, instead, name, primitive)

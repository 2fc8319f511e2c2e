"""What of torch's layers the fused ops can stand in for, and when they must not.

Nothing is remembered between calls. Every call inspects all its parts before it runs any of them, so a hook, a
parametrization or another layer that was added later is honoured: the part it affects runs eagerly. Detecting a
change exactly would mean reading the same things: class, hooks, forward, and the options of every part. Reading them
takes 4 us per unit in a loop of its own, and several times that between operators, whose code displaces Python's in
the caches. ``torch.compile``, ``torch.export``, tracing, ``torch.func`` and forward-mode AD see the eager
forward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._torch import COMPILED_CALL, call_hooks, looked_into
from .sharding import own_type


class Activation(NamedTuple):
    """An activation as ``batch_norm_act`` is told of it, and its slope left of zero."""

    name: str
    slope: float


NOTHING, RELU = Activation("none", 1.0), Activation("relu", 0.0)


def replaced_call(module: nn.Module) -> str | None:
    """Why calling ``module`` does more, or other, than its class's forward; None where it does not."""
    own = module.__dict__  # this and what follows is asked at every call, and nn.Module's attributes take their time
    if any(call_hooks(own)):  # a call that hooks wait for must happen
        return "has hooks"
    if "forward" in own:
        return "has a forward of its own"
    if own.get(COMPILED_CALL) is not None:
        return "is compiled"
    return None


#: Why a layer stays eager that ``fully_shard`` was called on; hooks of its own then stand between it and the others.
SHARDED_ALONE = "is sharded by itself; fuse first, then fully_shard the block around it"


def _other_type(module: nn.Module | None, known: set[type], wanted: str) -> str:
    own = own_type(module)
    if own in known:
        return SHARDED_ALONE
    return f"is of type {own.__name__}, not {wanted}"


#: The classes of normalisation that can be fused.
FUSABLE_NORMS: set[type] = {nn.BatchNorm2d}


def norm_hindrance(module: nn.Module | None) -> str | None:
    """Why a normalisation layer stays eager; None for an ``nn.BatchNorm2d`` that can be fused."""
    if module is None or type(module) not in FUSABLE_NORMS:
        return _other_type(module, FUSABLE_NORMS, "nn.BatchNorm2d")
    if module.eps <= 0:  # type: ignore[operator]
        return f"has eps {module.eps}, which torch judges"
    return replaced_call(module)


def conv_hindrance(module: nn.Module | None) -> str | None:
    """Why a convolution stays eager; None for an ``nn.Conv2d`` that can be fused."""
    if type(module) is not nn.Conv2d:
        return _other_type(module, {nn.Conv2d}, "nn.Conv2d")
    if module.padding_mode != "zeros":
        return f"pads with {module.padding_mode!r}"
    if module.padding == "same" and any(
        d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)
    ):
        return "pads one side more than the other"
    return replaced_call(module)


def pool_hindrance(module: nn.Module) -> str | None:
    """Why a max pooling stays eager; None for an ``nn.MaxPool2d`` that can be fused."""
    if type(module) is not nn.MaxPool2d:
        return _other_type(module, {nn.MaxPool2d}, "nn.MaxPool2d")
    if module.return_indices or module.ceil_mode or _pair(module.dilation) != (1, 1):
        return "returns indices, rounds its size up or is dilated"
    height, width = _pair(module.kernel_size)
    if height * width > 256:
        return "has a window of more than 256 elements"
    if any(2 * p > k for p, k in zip(_pair(module.padding), (height, width), strict=True)):
        return "pads by more than half of its window"
    return replaced_call(module)


def _pair(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value, value) if isinstance(value, int) else tuple(value)


def activation_of(module: nn.Module | None) -> Activation | None:
    """How ``batch_norm_act`` is told of this activation; None where it cannot be or must not."""
    kind = type(module)
    if module is None or kind not in (nn.ReLU, nn.LeakyReLU) or replaced_call(module) is not None:
        return None
    return Activation("leaky_relu", float(module.negative_slope)) if isinstance(module, nn.LeakyReLU) else RELU


def must_be_eager(x: Tensor) -> bool:
    """Whether this call cannot go through autograd nodes of our own.

    Tracers, function transforms and forward-mode AD look inside. Global module hooks want every module's call; an
    empty batch is torch's to judge.
    """
    return not isinstance(x, Tensor) or looked_into() or x.numel() == 0


class Fit(NamedTuple):
    """What an input and its statistics must be for a normalisation's tensors, all of which are regular."""

    channels: int
    device: torch.device
    dtype: torch.dtype | None


#: What a normalisation would do, in the terms of :func:`auglocal_ext.ops.batch_norm_act`: weight, bias, running_mean,
#: running_var, num_batches_tracked, training, momentum, eps; and what it fits, None where that was not looked at or
#: the tensors do not fit each other. Made at every call, so a plain tuple.
NormCall = tuple[
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None, bool, Any, float, Fit | None
]


def norm_call(norm: nn.BatchNorm2d) -> NormCall:
    """How to do what ``norm`` would; a momentum of None is for :func:`counted`."""
    parameters, buffers = norm.__dict__["_parameters"], norm.__dict__["_buffers"]
    try:
        weight, bias, mean = parameters["weight"], parameters["bias"], buffers["running_mean"]
        var, batches = buffers["running_var"], buffers["num_batches_tracked"]
    except KeyError:  # one of them is a plain attribute
        weight, bias, mean = norm.weight, norm.bias, norm.running_mean
        var, batches = norm.running_var, norm.num_batches_tracked
    training = norm.training
    if not training:
        batches = None
    elif not norm.track_running_stats:
        batches = mean = var = None
    fit = None if mean is None or var is None else _fit(weight, bias, mean, var, batches)
    return weight, bias, mean, var, batches, training or (mean is None and var is None), norm.momentum, norm.eps, fit


def _fit(weight: Tensor | None, bias: Tensor | None, mean: Tensor, var: Tensor, batches: Tensor | None) -> Fit | None:
    shape, device, dtype = mean.shape, mean.device, mean.dtype
    if len(shape) != 1 or var.dtype is not dtype or not (mean.is_contiguous() and var.is_contiguous()):
        return None
    for vector in (weight, bias, var):
        if vector is not None and (vector.shape != shape or vector.device != device):
            return None
    if batches is not None and (batches.dtype is not torch.int64 or batches.device != device):
        return None
    return Fit(shape[0], device, dtype)


def counted(call: NormCall) -> NormCall:
    """``call`` with a momentum for None, that of a cumulative average over the batches, this one among them."""
    weight, bias, mean, var, batches, training, momentum, eps, fit = call
    if momentum is None:
        momentum = 0.0
        if batches is not None:
            batches.add_(1)
            momentum, batches = 1.0 / float(batches), None
    return weight, bias, mean, var, batches, training, momentum, eps, fit


#: What a convolution would do: weight, bias, and what follows them among the arguments of ``aten::convolution``.
ConvCall = tuple[Tensor, Tensor | None, tuple[Any, ...]]


def conv_call(conv: nn.Conv2d) -> ConvCall:
    """How to do what ``conv(x)`` would."""
    padding = conv.padding
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    elif padding == "valid":
        padding = (0, 0)
    parameters = conv.__dict__["_parameters"]
    try:
        weight, bias = parameters["weight"], parameters["bias"]
    except KeyError:  # one of them is a plain attribute
        weight, bias = conv.weight, conv.bias
    return weight, bias, (conv.stride, padding, conv.dilation, False, (0, 0), conv.groups)


def pool_arguments(pool: nn.MaxPool2d) -> dict[str, Any]:
    """What to hand to ``batch_norm_act_max_pool`` so that it does what ``pool`` would."""
    return {"kernel_size": pool.kernel_size, "stride": pool.stride, "padding": pool.padding}

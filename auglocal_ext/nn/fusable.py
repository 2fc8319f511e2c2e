"""What of torch's layers the fused ops can stand in for, and when they must not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

#: Activation and slope as ``batch_norm_act`` takes them.
Activation = tuple[str, float]


def replaced_call(module: nn.Module) -> str | None:
    """Why calling ``module`` does more, or other, than its class's forward; None where it does not."""
    if (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks  # a call that hooks wait for must happen
    ):
        return "has hooks"
    if "forward" in module.__dict__:
        return "has a forward of its own"
    if module._compiled_call_impl is not None:
        return "is compiled"
    return None


def norm_hindrance(module: nn.Module) -> str | None:
    """Why a normalisation layer stays eager; None for an ``nn.BatchNorm2d`` that can be fused."""
    if type(module) is not nn.BatchNorm2d:
        return f"is of type {type(module).__name__}, not nn.BatchNorm2d"
    return replaced_call(module)


def conv_hindrance(module: nn.Module) -> str | None:
    """Why a convolution stays eager; None for an ``nn.Conv2d`` that can be fused."""
    if type(module) is not nn.Conv2d:
        return f"is of type {type(module).__name__}, not nn.Conv2d"
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
        return f"is of type {type(module).__name__}, not nn.MaxPool2d"
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


def activation_of(module: nn.Module) -> Activation | None:
    """How ``batch_norm_act`` is told of this activation; None where it cannot be or must not."""
    if type(module) not in (nn.ReLU, nn.LeakyReLU) or replaced_call(module) is not None:
        return None
    return ("leaky_relu", float(module.negative_slope)) if isinstance(module, nn.LeakyReLU) else ("relu", 0.0)


def must_be_eager(x: Tensor) -> bool:
    """Whether this call cannot go through autograd nodes of our own: tracers and function transforms look inside.

    Global module hooks want every module's call; an empty batch is torch's to judge.
    """
    return (
        not isinstance(x, Tensor)
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or _has_any_global_hook()
        or x.numel() == 0
    )


def norm_arguments(norm: nn.BatchNorm2d, x: Tensor) -> dict[str, Any]:
    """What to hand to ``batch_norm_act`` so that it does what ``norm`` would; counts the batch as ``norm`` does."""
    norm._check_input_dim(x)
    momentum = 0.0 if norm.momentum is None else norm.momentum
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if norm.momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    uses_running = not norm.training or norm.track_running_stats
    return {
        "weight": norm.weight,
        "bias": norm.bias,
        "running_mean": norm.running_mean if uses_running else None,
        "running_var": norm.running_var if uses_running else None,
        "training": norm.training or (norm.running_mean is None and norm.running_var is None),
        "momentum": momentum,
        "eps": norm.eps,
    }


def conv_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    """What to hand to ``norm_act_conv`` so that it does what ``conv`` would."""
    padding = conv.padding
    if padding == "same":
        padding = tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size, strict=True))
    elif padding == "valid":
        padding = (0, 0)
    return {
        "conv_weight": conv.weight,
        "conv_bias": conv.bias,
        "stride": conv.stride,
        "padding": padding,
        "dilation": conv.dilation,
        "groups": conv.groups,
    }


def pool_arguments(pool: nn.MaxPool2d) -> dict[str, Any]:
    """What to hand to ``batch_norm_act_max_pool`` so that it does what ``pool`` would."""
    return {"kernel_size": pool.kernel_size, "stride": pool.stride, "padding": pool.padding}

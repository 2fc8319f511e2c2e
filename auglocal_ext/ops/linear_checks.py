"""What the losses of a linear layer take: shapes of its parameters, label smoothing, devices and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from . import providers


def check_layer(
    x: Tensor, channels: int, weight: Tensor, bias: Tensor | None, target: Tensor, label_smoothing: float, classes: str
) -> None:
    """TypeError or ValueError unless a layer of ``channels`` inputs fits x and the targets.

    Args:
        x: what the layer is applied to.
        channels: of x.
        weight, bias: of the layer; bias may be None.
        target: labels, of a form that has been checked.
        label_smoothing: in [0, 1].
        classes: the letter for the number of outputs, in messages.
    """
    if weight.dim() != 2 or weight.shape[1] != channels or weight.shape[0] == 0:
        raise ValueError(
            f"expected weight of shape ({classes}, {channels}) for x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"expected bias of shape ({weight.shape[0]},) or None, got {tuple(bias.shape)}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"expected label_smoothing between 0 and 1, got {label_smoothing}")
    device = x.device
    for name, tensor in (("weight", weight), ("bias", bias), ("target", target)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"expected {name} on {device} as x, got it on {tensor.device}; move it with .to(x.device)")
    if x.dtype not in providers.ALL:
        raise TypeError(f"expected x in float16, bfloat16, float32 or float64, got {x.dtype}")
    if torch.is_autocast_enabled(device.type) and x.dtype != torch.float64:
        allowed = providers.SINGLE
    else:
        allowed = frozenset({x.dtype})
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype not in allowed:
            raise TypeError(
                f"expected {name} in {x.dtype} as x, got {tensor.dtype}; convert one of them, or run under "
                "torch.autocast, which lets float16, bfloat16 and float32 meet"
            )

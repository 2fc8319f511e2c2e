"""What the BatchNorm ops take: dtypes, shapes, devices, ``eps`` and activations."""

from __future__ import annotations

import torch
from torch import Tensor

from . import providers

ACTIVATIONS = ("relu", "leaky_relu", "none")


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which maps like ``x`` are accumulated."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cast_to(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    """``tensor.to(dtype)``, which takes its time also where there is nothing to do."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def slope_of(activation: str, negative_slope: float) -> float:
    """Slope of the activation below zero, by which providers know which activation it is."""
    if activation == "relu":
        return 0.0
    if activation == "none":
        return 1.0
    if activation == "leaky_relu":
        return float(negative_slope)
    raise ValueError(f"expected activation {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")


def check_map(x: Tensor) -> None:
    if x.dim() < 2 or 0 in x.shape:
        raise ValueError(
            f"expected x of shape (N, C) or (N, C, *positions) with at least one image, channel and position, "
            f"got {tuple(x.shape)}"
        )
    if x.dtype not in providers.ALL:
        raise TypeError(f"expected x in float16, bfloat16, float32 or float64, got {x.dtype}")


def check_eps(eps: float, training: bool) -> None:
    """ValueError, as from F.batch_norm, for an ``eps`` with which a constant channel could become infinite."""
    if eps < 0 or (training and eps == 0):
        raise ValueError(f"expected a positive eps{'' if training else ' or 0'}, got {eps}")


def check_tensors(x: Tensor, vectors: dict[str, Tensor | None], residual: Tensor | None) -> None:
    if _fit(x, vectors, residual):
        return
    check_map(x)
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.shape != x.shape[1:2]:
            raise ValueError(
                f"expected {name} of shape ({x.shape[1]},) for x {tuple(x.shape)}, got {tuple(vector.shape)}"
            )
        if vector.dtype not in (x.dtype, wide_dtype(x)):
            raise TypeError(f"expected {name} in {wide_dtype(x)} or, as x, {x.dtype}, got {vector.dtype}; convert it")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise (ValueError if residual.dtype == x.dtype else TypeError)(
            f"expected residual {tuple(x.shape)} in {x.dtype} as x, got {tuple(residual.shape)} in {residual.dtype}"
        )
    for name, tensor in {**vectors, "residual": residual}.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"expected {name} on {x.device} as x, got it on {tensor.device}; move it with .to(x.device)"
            )


def _fit(x: Tensor, vectors: dict[str, Tensor | None], residual: Tensor | None) -> bool:
    """Whether nothing is to be explained, which every call asks."""
    shape, device, dtype = x.shape, x.device, x.dtype
    if len(shape) < 2 or 0 in shape or dtype not in providers.ALL:
        return False
    channels, wide = shape[1:2], wide_dtype(x)
    for vector in vectors.values():
        if vector is not None:
            kind = vector.dtype
            if not (kind is dtype or kind is wide) or vector.shape != channels or vector.device != device:
                return False
    return residual is None or residual.shape == shape and residual.dtype is dtype and residual.device == device

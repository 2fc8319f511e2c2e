"""Transforms of ``torch.func`` and forward-mode AD, which the fused ops cannot be part of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .._torch import functorch_active, transforms_active


def refuse_transforms(name: str, instead: str, *tensors: Tensor | None) -> None:
    """NotImplementedError under a transform of ``torch.func``, and for tensors with a tangent of forward-mode AD.

    torch's own errors there are about batching rules and autograd functions, and some tangents are dropped silently.

    Args:
        name: the op.
        instead: torch's function that has these derivatives.
        tensors: its differentiable inputs.
    """
    if torch.compiler.is_compiling() or not transforms_active():
        return
    if functorch_active():
        raise NotImplementedError(
            f"{name} does not work under torch.func (vmap, grad, jvp, jacrev, hessian, ...). Take gradients by "
            f"backward() or torch.autograd.grad, or under torch.func use {instead}"
        )
    if any(tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise NotImplementedError(
            f"{name} has no forward-mode derivative. Take gradients by backward(), or for forward mode use {instead}"
        )

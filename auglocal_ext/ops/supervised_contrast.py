"""Supervised contrast of normalised features as one op, without a matrix of all pairs."""

from __future__ import annotations

import torch
from torch import Tensor

from . import labels, nodes, providers, registry
from .reference.supervised_contrast import Outputs
from .transforms import refuse_transforms

NAME = "supervised_contrast"
_INSTEAD = "the formula in its docstring, in torch's own functions"


def supervised_contrast(
    features: Tensor,
    target: Tensor,
    temperature: float,
    ignore_index: int = -100,
    *,
    provider: str | None = None,
) -> Tensor:
    """``mean_i mean_{p in P(i)} -log(exp(z_i z_p / t) / sum_{a != i} exp(z_i z_a / t))``, its gradient made with it.

    z are the rows of ``features``, divided by their norms (at least 1e-12). P(i) are the other images of i's class. An
    image without such others is no anchor. Nor is one of the ignored label, which is in no sum either. Without any
    anchor the loss is 0.

    The matrix of all pairs never exists: at most 256 of its rows do. (N, D) numbers are stored for backward, which only
    scales what the forward pass made, so the loss can be differentiated once. Autocast changes nothing. The matrix
    products are torch's, whose last bits may depend on the number of CPU threads.

    Args:
        features: ``(N, D)`` in float16, bfloat16, float32 or float64, any strides.
        target: labels ``(N,)``, int64, any numbers.
        temperature: t.
        ignore_index: label that counts nowhere.
        provider: None (automatic) or ``"reference"``, ``"aten"``, ``"cpu"``, ``"cuda"``, ``"triton"``.

    Returns:
        The loss, a scalar in float32 (float64 for double features), in which sums are accumulated; the gradient has the
        dtype of the features.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device or temperature.
        RuntimeError: for a provider that is not available.
        NotImplementedError: under ``torch.func``, and for inputs with a tangent of forward-mode AD.

    Source: Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, eq. 2, one view per image.
    """
    refuse_transforms(NAME, _INSTEAD, features)
    _check(features, target, temperature)
    op = registry.chosen(NAME, features, provider)
    arguments = (
        *(features, target, float(temperature), ignore_index),
        torch.is_grad_enabled() and features.requires_grad,
    )
    device = features.device.type
    if torch.is_autocast_enabled(device):
        # The providers call matmul themselves, which autocast would send to its own dtype.
        with torch.autocast(device, enabled=False):
            return registry.first(op, *arguments)
    return registry.first(op, *arguments)


def _check(features: Tensor, target: Tensor, temperature: float) -> None:
    labels.check_form(target)
    if features.dim() != 2 or 0 in features.shape:
        raise ValueError(
            f"expected features of shape (N, D) with at least one image and one feature, got {tuple(features.shape)}; "
            "flatten or pool them first"
        )
    if features.dtype not in providers.ALL:
        raise TypeError(f"expected features in float16, bfloat16, float32 or float64, got {features.dtype}")
    if target.shape[0] != features.shape[0]:
        raise ValueError(f"expected {features.shape[0]} labels, one per row of features, got {target.shape[0]}")
    if target.device != features.device:
        raise ValueError(
            f"expected target on {features.device} as features, got it on {target.device}; "
            "move it with .to(features.device)"
        )
    if not 0.0 < temperature < float("inf"):
        raise ValueError(f"expected a positive, finite temperature, got {temperature}")


def _fake(features: Tensor, target: Tensor, temperature: float, ignore_index: int, need_grad: bool) -> Outputs:
    dtype = torch.float64 if features.dtype == torch.float64 else torch.float32
    made = features.shape if need_grad else (0,)
    return features.new_empty((), dtype=dtype), features.new_empty(made, dtype=dtype)


def _flops(features: Tensor, target: Tensor, temperature: float, ignore_index: int, need_grad: bool) -> int:
    images, width = features.shape
    return (6 if need_grad else 2) * images * images * width


TABLE = registry.table(NAME)

registry.primitive(
    TABLE,
    NAME,
    "(Tensor features, Tensor target, float temperature, int ignore_index, bool need_grad) "
    "-> (Tensor loss, Tensor grad_features)",
    _fake,
    "forward",
)
nodes.autograd(
    TABLE,
    [nodes.Gradients(None, {"features": "grad_features"})],
    lambda inputs: 0,
    instead=_INSTEAD,
    name=NAME,
    primitive=NAME,
)
registry.flops(NAME, _flops)

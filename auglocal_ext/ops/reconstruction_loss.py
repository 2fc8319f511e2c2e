"""Sigmoid, restoration of the image and binary cross-entropy as one op: the loss of an image decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import providers, registry
from .layout import empty_like
from .transforms import refuse_transforms

NAME = "reconstruction_loss"
_INSTEAD = "F.binary_cross_entropy_with_logits"


def reconstruction_loss(
    logits: Tensor, image: Tensor, mean: Tensor, std: Tensor, *, provider: str | None = None
) -> Tensor:
    """loss = mean over all elements of BCE(sigmoid(logits), clamp(image std + mean, 0, 1)), scalar.

    Equal to ``F.binary_cross_entropy_with_logits(logits, (image * std + mean).clamp(0, 1))``, in one pass that makes
    the gradient too. Between forward and backward sigmoid(logits) - target is stored, in the logits' dtype, and neither
    the logits nor the restored image. Backward divides it by the number of elements in the dtype of the loss, so that
    in float16 nothing underflows that a loss scale would have lifted. Differentiable once, with respect to the logits
    only.

    Args:
        logits: ``(N, C, H, W)`` in float16, bfloat16, float32 or float64, any strides.
        image: ``(N, C, H, W)``, the network's normalised input, in any of these dtypes and with any strides.
        mean: ``(C,)``, in units of [0, 1].
        std: ``(C,)``, in units of [0, 1].
        provider: None (automatic) or ``"reference"``, ``"aten"``, ``"cpu"``, ``"cuda"``, ``"triton"``.

    Returns:
        The loss in float32 (float64 for double logits), in which sums are accumulated; the gradient has the dtype and
        layout of the logits.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape or device.
        RuntimeError: for a provider that is not available.
        NotImplementedError: under ``torch.func``, and for inputs with a tangent of forward-mode AD.
    """
    refuse_transforms(NAME, _INSTEAD, logits)
    _check(logits, image, mean, std)
    op = registry.chosen(NAME, logits, provider)
    return registry.first(op, logits, image, mean, std, torch.is_grad_enabled() and logits.requires_grad)


def _check(logits: Tensor, image: Tensor, mean: Tensor, std: Tensor) -> None:
    if logits.dim() != 4 or 0 in logits.shape:
        raise ValueError(f"expected logits of shape (N, C, H, W) with elements, got {tuple(logits.shape)}")
    if image.shape != logits.shape:
        raise ValueError(
            f"expected image {tuple(logits.shape)} as logits, got {tuple(image.shape)}; resize one of them"
        )
    for name, tensor in (("mean", mean), ("std", std)):
        if tensor.shape != logits.shape[1:2]:
            raise ValueError(
                f"expected {name} of shape ({logits.shape[1]},), one value per channel, got {tuple(tensor.shape)}"
            )
    for name, tensor in (("image", image), ("mean", mean), ("std", std)):
        if tensor.device != logits.device:
            raise ValueError(
                f"expected {name} on {logits.device} as logits, got it on {tensor.device}; move it with .to(...)"
            )
    for name, tensor in (("logits", logits), ("image", image), ("mean", mean), ("std", std)):
        if tensor.dtype not in providers.ALL:
            raise TypeError(f"expected {name} in float16, bfloat16, float32 or float64, got {tensor.dtype}")


def _fake(logits: Tensor, image: Tensor, mean: Tensor, std: Tensor, need_grad: bool) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((), dtype=dtype), empty_like(logits) if need_grad else logits.new_empty(0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])
    ctx.made = inputs[4]


def _backward(provider: str, ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    nothing = (None, None, None, None)
    if grad_loss is None or not ctx.needs_input_grad[0]:
        return None, *nothing
    if not ctx.made:
        raise RuntimeError(f"{NAME}: the gradient of logits was not made; set need_grad for it")
    (grad,) = ctx.saved_tensors
    # A scale of one dimension keeps its dtype beside a 16-bit map, where a scalar would be rounded to 16 bits first;
    # the product is rounded as it is written.
    scale = (grad_loss / grad.numel()).view(1)
    if grad.dtype == scale.dtype:
        return grad * scale, *nothing
    return torch.mul(grad, scale, out=torch.empty_like(grad)), *nothing


TABLE = registry.table(NAME)

registry.primitive(
    TABLE,
    NAME,
    "(Tensor logits, Tensor image, Tensor mean, Tensor std, bool need_grad) -> (Tensor loss, Tensor grad)",
    _fake,
    "forward",
)
registry.autograd(TABLE, _backward, _setup_context, instead=_INSTEAD, results=1)

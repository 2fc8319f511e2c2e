"""Similarity matching (PredSim's second loss) as one op, and the pass over the feature map that its backward is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import labels, providers, registry
from .flags import not_a_flag
from .layout import empty_like
from .reference.similarity_loss import Outputs, statistics
from .transforms import refuse_transforms

NAME = "similarity_loss"
_INPUT_GRAD = f"{NAME}_input_grad"
_INSTEAD = "the formula in its docstring, in torch's own functions"


def similarity_loss(
    z: Tensor,
    target: Tensor,
    num_classes: int,
    *,
    ignore_index: int = -100,
    provider: str | None = None,
    check_labels: bool = True,
) -> Tensor:
    """loss = mean over pairs (i, j) of (S(std_p(z))_ij - S(onehot(y))_ij)^2, its gradient made in the same pass.

    std_p is the unbiased standard deviation over the positions of an image. S is the adjusted cosine similarity: rows
    are centred, divided by their length + 1e-8, multiplied, and clamped to -1 .. 1. S(onehot(y)) is 1 within a class
    and -1/(K - 1) between two classes (0 for K = 1). Images of the label ``ignore_index`` are in no pair, whatever
    their values. Without any pair the loss is NaN and its gradient 0.

    Between forward and backward z itself and two (N, C) tensors are stored, for vectors one. No (N, N) tensor is: the
    similarities are made some rows at a time. The loss can be differentiated once. Where a standard deviation is 0 and
    has no derivative, the gradient is 0; no gradient passes the clamp outside -1 .. 1. Under autocast z is used as it
    is.

    Args:
        z: ``(N, C, *positions)`` with at least two positions, or vectors ``(N, C)``, which are used in place of a std;
            float16, bfloat16, float32 or float64, any strides.
        target: labels ``(N,)``, int64, below ``num_classes``.
        num_classes: K.
        ignore_index: label that counts nowhere.
        provider: None (automatic) or ``"reference"``, ``"aten"``, ``"cpu"``, ``"cuda"``, ``"triton"``.
        check_labels: False if the labels have been checked already; one outside [0, K) is then treated as ignored.

    Returns:
        The loss, a scalar in float32 (float64 for a double z), in which everything is accumulated; the gradient has z's
        dtype and is channels-last where z is.

    Raises:
        TypeError: for a wrong dtype, and for a ``check_labels`` that is neither True nor False.
        ValueError: for a wrong shape, device, label or number of classes.
        RuntimeError: for a provider that is not available.
        NotImplementedError: under ``torch.func``, and for inputs with a tangent of forward-mode AD.

    Source: Noekland and Eidnes, Training Neural Networks with Local Error Signals, ICML 2019, section 2.2.
    """
    refuse_transforms(NAME, _INSTEAD, z)
    _check(z, target, num_classes)
    if check_labels is not True and check_labels is not False:
        raise not_a_flag("check_labels", check_labels)
    if check_labels:
        labels.check_labels(target, num_classes, ignore_index)
    op = registry.chosen(NAME, z, provider)
    arguments = (z, target, num_classes, ignore_index, torch.is_grad_enabled() and z.requires_grad)
    device = z.device.type
    if torch.is_autocast_enabled(device):
        # The providers call matmul themselves, which autocast would send to its own dtype.
        with torch.autocast(device, enabled=False):
            return registry.first(op, *arguments)
    return registry.first(op, *arguments)


def channel_std(z: Tensor) -> Tensor:
    """std_p(z) as :func:`similarity_loss` takes it, ``(N, C, *positions) -> (N, C)``, where it is gathered first.

    In float32, float64 for a double z. For backward z is stored, and two ``(N, C)`` tensors.
    """
    refuse_transforms("channel_std", "z.flatten(2).std(dim=2)", z)
    return _ChannelStd.apply(z)


class _ChannelStd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        mean, std = statistics(z)
        ctx.save_for_backward(z, mean, std)
        return std

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        z, mean, std = ctx.saved_tensors
        factor = torch.where(std > 0, grad / (std * (z.shape[2:].numel() - 1)), 0)
        input_grad = registry.chosen(NAME, z, None, _INPUT_GRAD)
        return input_grad(z, mean, factor, factor.new_ones(()))


def _check(z: Tensor, target: Tensor, num_classes: int) -> None:
    labels.check_form(target)
    if z.dim() < 2 or 0 in z.shape:
        raise ValueError(
            f"expected z of shape (N, C) or (N, C, *positions) with at least one image, channel and position, "
            f"got {tuple(z.shape)}"
        )
    if z.dim() > 2 and z.shape[2:].numel() == 1:
        raise ValueError(
            f"expected at least two positions, of which the standard deviation is taken, got {tuple(z.shape)}; "
            "z.flatten(1) makes vectors of it, which are compared themselves"
        )
    if z.dtype not in providers.ALL:
        raise TypeError(f"expected z in float16, bfloat16, float32 or float64, got {z.dtype}")
    if target.shape[0] != z.shape[0]:
        raise ValueError(f"expected {z.shape[0]} labels, one per image of z, got {target.shape[0]}")
    if target.device != z.device:
        raise ValueError(f"expected target on {z.device} as z, got it on {target.device}; move it with .to(z.device)")
    if num_classes < 1:
        raise ValueError(f"expected num_classes of at least 1, got {num_classes}")


def _wide(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def _fake(z: Tensor, target: Tensor, classes: int, ignore_index: int, need_grad: bool) -> Outputs:
    def new(*shape: int, made: bool = True) -> Tensor:
        return z.new_empty(shape if made else (0,), dtype=_wide(z))

    return new(), new(*z.shape[:2], made=need_grad and z.dim() > 2), new(*z.shape[:2], made=need_grad)


def _fake_input_grad(z: Tensor, *_: Any) -> Tensor:
    return empty_like(z)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    z, *_, ctx.made = inputs
    _, mean, factor = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, factor)
    ctx.dtype = z.dtype
    ctx.save_for_backward(*((z, mean, factor) if z.dim() > 2 else (factor,)))


def _backward(provider: str, ctx: Any, grad_loss: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    grads: list[Tensor | None] = [None] * 5
    if grad_loss is None or not ctx.needs_input_grad[0]:
        return tuple(grads)
    if not ctx.made:
        raise RuntimeError(f"{NAME}: the gradient of z was not made; set need_grad for it")
    *saved, factor = ctx.saved_tensors
    # Scaled before it is rounded: in float16 the gradient of one position alone would underflow.
    if saved:
        grads[0] = registry.kernel(_INPUT_GRAD, provider)(*saved, factor, grad_loss)
    else:
        grads[0] = (grad_loss * factor).to(ctx.dtype)
    return tuple(grads)


def _flops(z: Tensor, target: Tensor, classes: int, ignore_index: int, need_grad: bool) -> int:
    images, channels = z.shape[:2]
    return (4 if need_grad else 2) * images * images * channels


TABLE = registry.table(NAME)

registry.primitive(
    TABLE,
    NAME,
    "(Tensor z, Tensor target, int classes, int ignore_index, bool need_grad) "
    "-> (Tensor loss, Tensor mean, Tensor factor)",
    _fake,
    "forward",
)
registry.primitive(
    TABLE,
    _INPUT_GRAD,
    "(Tensor z, Tensor mean, Tensor factor, Tensor grad_loss) -> Tensor",
    _fake_input_grad,
    "input_grad",
)
registry.autograd(TABLE, _backward, _setup_context, instead=_INSTEAD, results=1)
registry.flops(NAME, _flops)

"""Global average pool, linear classifier and cross-entropy as one op."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import labels, nodes, registry
from .flags import not_a_flag
from .linear_checks import check_layer
from .reference.pooled_cross_entropy import Outputs
from .transforms import refuse_transforms

NAME = "pooled_cross_entropy"
_INSTEAD = "PooledLinear's forward and F.cross_entropy"


class PooledCrossEntropy(NamedTuple):
    """What :func:`pooled_cross_entropy` returns; only the loss is differentiable.

    Attributes:
        loss: scalar, float32 (float64 for a double x).
        logits: ``(N, K)``, in the dtype of the loss.
        correct: number of top-1 hits, int64 scalar.
    """

    loss: Tensor
    logits: Tensor
    correct: Tensor


def pooled_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    provider: str | None = None,
    check_labels: bool = True,
) -> PooledCrossEntropy:
    """loss = cross_entropy(mean over positions(x) W^T + b, target), its gradients made in the same pass.

    Equal to ``F.cross_entropy(F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias), target, ...)``, with two
    differences in form. Backward only scales what the forward pass made, so the loss can be differentiated once. And
    the gradient of x is an (N, C) tensor expanded over the positions. Under autocast x, weight and bias may differ in
    dtype; they are used as they are, without rounding to autocast's dtype.

    Args:
        x: ``(N, C)`` or ``(N, C, *positions)`` in float16, bfloat16, float32 or float64, any strides.
        weight: ``(K, C)``.
        bias: ``(K,)`` or None.
        target: labels ``(N,)``, int64.
        ignore_index: label that counts nowhere.
        label_smoothing: in [0, 1], as in ``F.cross_entropy``.
        reduction: ``"mean"`` (over the labels that count) or ``"sum"``.
        provider: None (automatic) or ``"reference"``, ``"aten"``, ``"cpu"``, ``"cuda"``, ``"triton"``.
        check_labels: False if the labels have been checked already; one outside [0, K) is then treated as ignored.

    Returns:
        The loss (scalar), the logits ``(N, K)``, and the number of top-1 hits among the labels that count (int64
        scalar). Loss and logits are float32 (float64 for a double x), and sums are accumulated in that dtype; gradients
        have the dtypes of the inputs.

    Raises:
        TypeError: for a wrong dtype, and for a ``check_labels`` that is neither True nor False.
        ValueError: for a wrong shape, device, label or option.
        RuntimeError: for a provider that is not available.
        NotImplementedError: under ``torch.func``, and for inputs with a tangent of forward-mode AD.
    """
    refuse_transforms(NAME, _INSTEAD, x, weight, bias)
    _check(x, weight, bias, target, label_smoothing, reduction)
    if check_labels is not True and check_labels is not False:
        raise not_a_flag("check_labels", check_labels)
    if check_labels:
        labels.check_labels(target, weight.shape[0], ignore_index)
    device = x.device.type
    op = registry.chosen(NAME, x, provider, beside=(weight, bias, target))
    grad = torch.is_grad_enabled()
    arguments = (
        *(x, weight, bias, target, ignore_index, float(label_smoothing), reduction == "mean"),
        *(grad and tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)),
    )
    if torch.is_autocast_enabled(device):
        # The providers call matmul themselves, which autocast would send to its own dtype.
        with torch.autocast(device, enabled=False):
            return PooledCrossEntropy(*registry.run(op, *arguments)[:3])
    return PooledCrossEntropy(*registry.run(op, *arguments)[:3])


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, label_smoothing: float, reduction: str
) -> None:
    labels.check_form(target)
    if x.dim() < 2 or 0 in x.shape:
        raise ValueError(
            f"expected x of shape (N, C) or (N, C, *positions) with at least one image, channel and position, "
            f"got {tuple(x.shape)}"
        )
    if target.shape[0] != x.shape[0]:
        raise ValueError(f"expected {x.shape[0]} labels, one per image of x, got {target.shape[0]}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"expected reduction 'mean' or 'sum', got {reduction!r}")
    check_layer(x, x.shape[1], weight, bias, target, label_smoothing, "K")


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> Outputs:
    (images, channels), classes = x.shape[:2], weight.shape[0]

    def new(*shape: int, made: bool = True) -> Tensor:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return x.new_empty(shape if made else (0,), dtype=dtype)

    return (
        new(),
        new(images, classes),
        target.new_empty(()),
        new(images, channels, made=need_x),
        new(classes, channels, made=need_weight),
        new(classes, made=need_bias),
    )


def _flops(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    mean: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> int:
    return 2 * len(x) * weight.numel() * (1 + need_x + need_weight)


TABLE = registry.table(NAME)

registry.primitive(
    TABLE,
    NAME,
    "(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, float label_smoothing, "
    "bool mean, bool need_x, bool need_weight, bool need_bias) "
    "-> (Tensor loss, Tensor logits, Tensor correct, Tensor grad_pooled, Tensor grad_weight, Tensor grad_bias)",
    _fake,
    "forward",
)
nodes.autograd(
    TABLE,
    [nodes.Gradients(None, {"x": "grad_pooled", "weight": "grad_weight", "bias": "grad_bias"}, others=2)],
    lambda inputs: 0,
    instead=_INSTEAD,
    name=NAME,
    primitive=NAME,
)
registry.flops(NAME, _flops)

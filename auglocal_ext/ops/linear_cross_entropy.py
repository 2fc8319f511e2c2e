"""Linear layer and cross-entropy as one op, without the logits of all positions."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._torch import constant_when_compiled
from . import labels, nodes, providers, registry, tuning
from .cpu.linear_cross_entropy import is_small
from .flags import not_a_flag
from .linear_checks import check_layer
from .reference.linear_cross_entropy import Outputs, kept
from .transforms import refuse_transforms

NAME = "linear_cross_entropy"
_INSTEAD = "F.linear and F.cross_entropy"


class LinearCrossEntropy(NamedTuple):
    """What :func:`linear_cross_entropy` returns; only the loss is differentiable.

    Attributes:
        loss: scalar, float32 (float64 for a double x).
        correct: number of positions whose largest logit is the target's, int64 scalar.
        nll: sum of ``-log p`` of the targets, in the dtype of the loss, without label smoothing and z-loss.
    """

    loss: Tensor
    correct: Tensor
    nll: Tensor


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    provider: str | None = None,
    check_labels: bool = True,
) -> LinearCrossEntropy:
    """``mean [cross_entropy(x W^T + b, target) + z logsumexp(x W^T + b)^2]``, its gradients made in the same pass.

    The mean is over the targets that count; without any the loss is 0 and so are its gradients. The logits are made for
    some positions at a time, at least 128, and are not kept: those of one pass take about as many bytes as ``x``.
    Backward only scales what the forward pass made, so the loss can be differentiated once. For backward the gradients
    are stored, and nothing else. No gradient is made or stored for an input that needs none: pass ``weight.detach()``
    to read a layer that another loss trains.

    The factors of matrix products have the dtype of ``x``, on CUDA under autocast that of autocast. On other devices
    they are float32; the provider ``"cpu"`` leaves those of a bfloat16 ``x`` and ``weight`` as they are on processors
    that multiply them (AVX512-BF16). Sums and all else are float32, or float64 for a double ``x``.

    Args:
        x: hidden states ``(..., C)`` in float16, bfloat16, float32 or float64, any strides.
        weight: ``(V, C)``. Under autocast x, weight and bias may differ in dtype.
        bias: ``(V,)`` or None.
        target: labels ``(...)``, int64.
        ignore_index: label that counts nowhere.
        label_smoothing: in [0, 1], as in ``F.cross_entropy``.
        z_loss: z, the weight of the squared logarithm of the softmax's denominator; at least 0.
        provider: None (automatic), ``"cpu"``, ``"aten"`` (torch's kernels alone, in chunks) or ``"reference"`` (all
            logits at once).
        check_labels: False if the labels have been checked already; one outside [0, V) is then treated as ignored.

    Raises:
        TypeError: for a wrong dtype, and for a ``check_labels`` that is neither True nor False.
        ValueError: for a wrong shape, device, label or option.
        NotImplementedError: under ``torch.func``, and for inputs with a tangent of forward-mode AD.

    Source: the z-loss is that of Chowdhery et al., PaLM, 2022, section 5.
    """
    refuse_transforms(NAME, _INSTEAD, x, weight, bias)
    _check(x, weight, bias, target, label_smoothing, z_loss)
    rows, flat = (x, target) if x.dim() == 2 else (x.reshape(-1, x.shape[-1]), target.reshape(-1))
    if check_labels is not True and check_labels is not False:
        raise not_a_flag("check_labels", check_labels)
    if check_labels:
        labels.check_labels(flat, weight.shape[0], ignore_index)
    op = registry.chosen(NAME, x, provider)
    product = _product(x, weight, op)
    if op is _ON_CPU and type(x) in tuning.PLAIN and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        if is_small(len(rows), weight, label_smoothing, z_loss):
            op = _SMALL_ON_CPU  # which is not in Python
    grad = torch.is_grad_enabled()
    arguments = (
        *(rows, weight, bias, flat, ignore_index, float(label_smoothing), float(z_loss), product),
        *(grad and tensor is not None and tensor.requires_grad for tensor in (x, weight, bias)),
    )
    device = x.device.type
    if torch.is_autocast_enabled(device):
        # The providers call matmul themselves, which autocast would send to its own dtype.
        with torch.autocast(device, enabled=False):
            return LinearCrossEntropy(*registry.run(op, *arguments)[:3])
    return LinearCrossEntropy(*registry.run(op, *arguments)[:3])


def _product(x: Tensor, weight: Tensor, op: Any) -> torch.dtype:
    """The dtype of the factors of matrix products: a low one where products of low factors are summed in float32."""
    if x.dtype == torch.float64:
        return x.dtype
    if op is _ON_CPU and x.dtype == weight.dtype == torch.bfloat16 and _multiplies_bfloat16():
        return x.dtype
    if x.device.type != "cuda" or torch.version.hip is not None:
        return torch.float32
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


@constant_when_compiled
@lru_cache(maxsize=None)
def _multiplies_bfloat16() -> bool:
    """Whether this CPU has an instruction for it, which torch is not told to leave out."""
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and torch.cpu.get_capabilities().get(
        "avx512_bf16", False
    )


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, label_smoothing: float, z_loss: float
) -> None:
    if x.dim() < 1 or 0 in x.shape:
        raise ValueError(f"expected x of shape (..., C) with at least one position, got {tuple(x.shape)}")
    if target.shape != x.shape[:-1]:
        raise ValueError(
            f"expected a target per position of x, {tuple(x.shape[:-1])}, got {tuple(target.shape)} for x "
            f"{tuple(x.shape)}"
        )
    if target.dtype != torch.int64:
        labels.check_form(target.reshape(-1))
    if not 0.0 <= z_loss < float("inf"):
        raise ValueError(f"expected z_loss of at least 0, got {z_loss}")
    check_layer(x, x.shape[-1], weight, bias, target, label_smoothing, "V")


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    product: torch.dtype,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> Outputs:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty((), dtype=wide),
        target.new_empty(()),
        x.new_empty((), dtype=wide),
        x.new_empty(x.shape if need_x else (0,), dtype=kept(x.dtype)),
        x.new_empty(weight.shape if need_weight else (0,), dtype=kept(weight.dtype)),
        x.new_empty(weight.shape[:1] if need_bias else (0,), dtype=wide),
    )


def _flops(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    product: torch.dtype,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> int:
    return 2 * len(x) * weight.numel() * (1 + need_x + need_weight)


TABLE = registry.plain_table(NAME)

_SIGNATURE = (
    "(Tensor x, Tensor weight, Tensor? bias, Tensor target, int ignore_index, float label_smoothing, float z_loss, "
    "ScalarType product, bool need_x, bool need_weight, bool need_bias) "
    "-> (Tensor loss, Tensor correct, Tensor nll, Tensor grad_x, Tensor grad_weight, Tensor grad_bias)"
)
_SMALL = f"{NAME}_small"

registry.primitive(TABLE, NAME, _SIGNATURE, _fake, "forward")
registry.steered(
    TABLE,
    NAME,
    "forward",
    {
        "linear_cross_entropy_rows_": (
            "(Tensor(a!) logits, Tensor? bias, Tensor target, int ignore_index, float label_smoothing, float z_loss, "
            "float scale, bool gradient, Tensor(b!)? rounded, Tensor(c!)? grad_bias, Tensor(d!) totals) -> ()"
        ),
        "linear_cross_entropy_logits_": "(Tensor(a!) logits, Tensor x, Tensor weight) -> bool",
        "linear_cross_entropy_counted": "(Tensor target, int classes, int ignore_index) -> int",
        "linear_cross_entropy_results": (
            "(Tensor totals, int divisor, bool in_double) -> (Tensor loss, Tensor correct, Tensor nll)"
        ),
    },
)
_SMALL_TABLE = providers.Table(NAME, (TABLE.row("cpu"),))
registry.primitive(_SMALL_TABLE, _SMALL, _SIGNATURE, _fake, "forward")
_GRADIENTS = nodes.Gradients(None, {"x": "grad_x", "weight": "grad_weight", "bias": "grad_bias"}, others=2)
for table, name in ((TABLE, NAME), (_SMALL_TABLE, _SMALL)):
    nodes.autograd(table, [_GRADIENTS], lambda inputs: 0, instead=_INSTEAD, name=name, primitive=name)
    registry.flops(name, _flops)

_ON_CPU, _SMALL_ON_CPU = registry.overload(NAME, "cpu"), registry.overload(_SMALL, "cpu")

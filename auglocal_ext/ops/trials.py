"""What is timed of each op: forward and backward pass on the first images of a call, without autograd.

Vectors, labels and gradients are made here; times do not depend on their values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import tuning
from .batch_norm_checks import wide_dtype

_Kernel = Callable[[str], Any]
_Run = Callable[[], None]


def _vectors(x: Tensor, *values: float) -> list[Tensor]:
    return [x.new_full((x.shape[1],), value, dtype=wide_dtype(x)) for value in values]


def _labels(x: Tensor) -> Tensor:
    return torch.arange(len(x), device=x.device) % 10


def _batch_norm_act(kernel: _Kernel, x: Tensor, beside: tuple[Any, ...]) -> _Run:
    forward, backward = kernel("batch_norm_act_forward_"), kernel("batch_norm_act_backward")
    mean, var, weight, bias = _vectors(x, 0, 1, 1, 0)
    running = (mean, var) if x.numel() > x.shape[1] else (None, None)  # one value has no unbiased variance

    def run() -> None:
        y, *factors = forward(x, *running, None, weight, bias, None, 0.1, 1e-5, 0.0)
        backward(y, x, *factors, weight, bias, None, 0.0, True, True, True, False)

    return run


def _batch_norm_act_max_pool(kernel: _Kernel, x: Tensor, beside: tuple[Any, ...]) -> _Run:
    window = beside or (3, 3, 2, 2, 1, 1)
    op = "batch_norm_act_max_pool"
    apply, reduce, input_grad = kernel(f"{op}_apply"), kernel(f"{op}_reduce"), kernel(f"{op}_input_grad")
    factors = (*_vectors(x, 0, 1, 1, 0), 0.0)

    def run() -> None:
        pooled = apply(x, *factors, *window)
        sums = reduce(*pooled, x, *factors, *window)
        input_grad(*pooled, x, *factors, *sums, *window)

    return run


def _layer_norm(kernel: _Kernel, x: Tensor, beside: tuple[Any, ...]) -> _Run:
    forward, backward = kernel("layer_norm_forward"), kernel("layer_norm_backward")
    weight, bias = (x.new_full(x.shape[-1:], value, dtype=wide_dtype(x)) for value in (1, 0))

    def run() -> None:
        y, _, *statistics = forward(x, None, weight, bias, 1e-5, False)
        backward(y, None, x, *statistics, weight, False, True, True, True)

    return run


def _pooled_cross_entropy(kernel: _Kernel, x: Tensor, beside: tuple[Any, ...]) -> _Run:
    weight, bias, target = beside
    arguments = x, weight, bias, target[: len(x)], -100, 0.0, True, True, True, bias is not None
    return lambda: _dropped(kernel("pooled_cross_entropy")(*arguments))


def _reconstruction_loss(kernel: _Kernel, x: Tensor, beside: tuple[Any, ...]) -> _Run:
    mean, std = _vectors(x, 0.5, 0.25)
    return lambda: _dropped(kernel("reconstruction_loss")(x, x, mean, std, True))


def _similarity_loss(kernel: _Kernel, x: Tensor, beside: tuple[Any, ...]) -> _Run:
    op, input_grad, target = kernel("similarity_loss"), kernel("similarity_loss_input_grad"), _labels(x)

    def run() -> None:
        loss, *factors = op(x, target, 10, -100, True)
        if x.dim() > 2:
            input_grad(x, *factors, loss)

    return run


def _supervised_contrast(kernel: _Kernel, x: Tensor, beside: tuple[Any, ...]) -> _Run:
    target = _labels(x)
    return lambda: _dropped(kernel("supervised_contrast")(x, target, 0.1, -100, True))


def _dropped(results: Any) -> None:
    """The results are freed before the next run."""


# ``aten`` needs the most inside: at its peak four maps of x's size and dtype in ``batch_norm_act``, up to eight in the
# other ops on maps of 16 bits, which torch converts to float32. The call and its backward pass need one or two, or as
# little as (N, C) numbers in ``pooled_cross_entropy``: there the shares leave 16-bit maps on a CPU above it.
tuning.TRIALS |= {
    "batch_norm_act": tuning.Trial(_batch_norm_act, 4),
    "batch_norm_act_max_pool": tuning.Trial(_batch_norm_act_max_pool, 8),
    "layer_norm": tuning.Trial(_layer_norm, 5),
    "pooled_cross_entropy": tuning.Trial(_pooled_cross_entropy, 4),
    "reconstruction_loss": tuning.Trial(_reconstruction_loss, 2),
    "similarity_loss": tuning.Trial(_similarity_loss, 8),
    "supervised_contrast": tuning.Trial(_supervised_contrast, 4),
}

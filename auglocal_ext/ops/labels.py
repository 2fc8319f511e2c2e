"""Class labels: their form, which of them are out of range, and what stands in for those."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .deferred import check_values


def check_labels(target: Tensor, num_classes: int, ignore_index: int = -100) -> None:
    """Raise unless every label is in [0, num_classes) or equals ``ignore_index``.

    Dtype and shape are checked at once and everywhere. Values are checked at once on the CPU. On CUDA their count
    reaches the host later, see :func:`auglocal_ext.ops.raise_deferred_errors`.

    Args:
        target: labels ``(N,)``, int64.
        num_classes: K.
        ignore_index: label that is valid too.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, or with the first bad label and its index.
    """
    check_form(target)
    check_values(
        target,
        partial(bad_labels, target, num_classes, ignore_index),
        partial(first_bad, target, num_classes, ignore_index),
        partial(late, num_classes, ignore_index, of=target.numel()),
        partial(_all_classes, target, num_classes),
    )


def check_form(target: Tensor) -> None:
    """Raise unless ``target`` is a vector of int64."""
    if target.dtype != torch.int64:
        hint = "class numbers are whole" if target.is_floating_point() else "convert them with target.long()"
        raise TypeError(f"expected labels of dtype torch.int64, got {target.dtype}; {hint}")
    if target.dim() != 1:
        raise ValueError(f"expected labels of shape (N,), got {tuple(target.shape)}; pass one class number per sample")


def _all_classes(target: Tensor, num_classes: int) -> bool:
    """Whether all labels are in [0, num_classes), in one pass over them; False without labels."""
    if not target.numel():
        return False
    least, largest = target.aminmax()
    return 0 <= int(least) and int(largest) < num_classes


def bad_labels(target: Tensor, num_classes: int, ignore_index: int = -100) -> Tensor:
    """Which labels are neither in [0, num_classes) nor ignored."""
    return ((target < 0) | (target >= num_classes)) & (target != ignore_index)


def ignoring_bad_labels(target: Tensor, num_classes: int, ignore_index: int = -100) -> Tensor:
    """``target`` with ``ignore_index`` in place of labels out of range, which torch's losses stop a CUDA device for."""
    return target.masked_fill(bad_labels(target, num_classes, ignore_index), ignore_index)


def first_bad(target: Tensor, num_classes: int, ignore_index: int, bad: Tensor) -> str:
    """The message for labels out of range, by their mask."""
    index = int(bad.nonzero()[0])
    return (
        f"label {int(target[index])} at index {index} is out of range: expected "
        f"{expected(num_classes, ignore_index)}; {int(bad.sum())} of {target.numel()} labels are wrong. "
        "Check num_classes and the data set's numbering"
    )


def late(num_classes: int, ignore_index: int, count: int, *, of: int) -> str:
    """The message for labels of an earlier batch of ``of`` that were out of range."""
    return (
        f"{count} of {of} labels of an earlier batch were out of range: expected "
        f"{expected(num_classes, ignore_index)}. They were treated as ignored. "
        "Check num_classes and the data set's numbering; checking one batch on the CPU names the label"
    )


def expected(num_classes: int, ignore_index: int) -> str:
    """Which labels are right, in words."""
    return f"0 <= label < {num_classes} or the ignored label {ignore_index}"

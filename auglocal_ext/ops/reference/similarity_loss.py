"""Similarity matching in plain PyTorch, the gradient made in the forward pass as far as it is (N, C).

What every provider does:

- **Two passes over the map.** Forward makes the mean and deviation of each (n, c), as sums of differences. Backward
  makes dz = (z - mean) factor grad_loss, an op of its own (``similarity_loss_input_grad``). The map is stored by
  reference, with two (N, C) tensors; for vectors (N, C) only their gradient is stored.
- **No (N, N) tensor exists, only a block of its rows.** The library multiplies a block of unit rows by all rows, one
  kernel replaces similarities by differences, and the library multiplies again. By symmetry that product is half of
  the gradient, so the transposed one is never made.
- **The similarities of labels are two numbers**, 1 and -1/(K - 1) (0 for K = 1), so no matrix is made of them. Rows
  that do not count are zero before the first product, so a NaN in an ignored image goes nowhere.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..layout import empty_like

EPS = 1e-8  # added to the length of a row before it is divided by it
BLOCK = 1 << 20  # pairs whose similarities are made at a time

Outputs = tuple[Tensor, Tensor, Tensor]


def wanted(classes: int) -> tuple[float, float]:
    """S(onehot(y)) of two images of one class, and of two of different ones: 1 and -1/(K - 1), but for eps.

    A centred one-hot row has the length sqrt(1 - 1/K); with K = 1 it is zero, and so is S.
    """
    squared = (classes - 1) / classes
    scale = 1 / (math.sqrt(squared) + EPS) ** 2
    return squared * scale, max(-1.0, -scale / classes)


def forward(
    z: Tensor,  # feature map, (N, C, *positions), or vectors, (N, C)
    target: Tensor,  # labels, (N,) int64
    classes: int,
    ignore_index: int,
    need_grad: bool,
) -> Outputs:
    """loss () and, for the gradient, mean (N, C) of z over the P positions and factor (N, C).

    With f the unbiased std of z over the positions, or z itself for vectors, c_i = f_i - mean(f_i) and
    u_i = c_i / (|c_i| + eps):

        loss = sum_ij (clamp(u_i u_j) - T_ij)^2 / V^2,    T = S(onehot(y)), V images that count
        dz   = grad_loss (z - mean) factor,    factor = dloss/df / ((P - 1) f), 0 where f is 0
        dz   = grad_loss factor,    factor = dloss/df, for vectors, which have no mean (no elements)

    Everything is computed and returned in float32 (float64 for a double z). Rows of images that do not count are not
    looked at, and their factors are 0. Without ``need_grad`` neither mean nor factor has elements.
    """
    is_map = z.dim() > 2
    mean, features = statistics(z) if is_map else (z.new_empty(0, dtype=_wide(z)), z.to(_wide(z)))
    counts = (target >= 0) & (target < classes) & (target != ignore_index)
    unit, norm = _normalised(features, counts)
    same, different = wanted(classes)
    loss, products = unit.new_zeros(()), []
    rows = max(1, BLOCK // len(z))
    for first in range(0, len(z), rows):
        block = slice(first, first + rows)
        similar = unit[block] @ unit.t()
        of_one_class = target[block].unsqueeze(1) == target
        difference = similar.clamp(-1, 1).sub_(torch.full_like(similar, different).masked_fill_(of_one_class, same))
        difference.mul_(counts[block].unsqueeze(1) & counts)
        loss += difference.square().sum()
        if need_grad:
            products.append(difference.mul_(similar.abs() <= 1) @ unit)
    count = counts.sum().to(unit.dtype)
    loss = loss / count / count
    if not need_grad:
        return loss, features.new_empty(0), features.new_empty(0)

    grad_unit = torch.cat(products).mul_(4 / (count * count))
    grad = grad_unit / (norm + EPS) - unit * torch.where(norm > 0, (unit * grad_unit).sum(1, keepdim=True) / norm, 0)
    grad -= grad.mean(1, keepdim=True)
    if is_map:
        grad = torch.where(features > 0, grad / (features * (z.shape[2:].numel() - 1)), 0)
    return loss, mean, torch.where(counts.unsqueeze(1), grad, 0)


def input_grad(
    z: Tensor,  # (N, C, *positions)
    mean: Tensor,  # (N, C) from forward, as the one below
    factor: Tensor,
    grad_loss: Tensor,  # () in the accumulation dtype
) -> Tensor:
    """grad_loss (z - mean) factor, in the dtype of z and where ``empty_like(z)`` puts it."""
    return empty_like(z).copy_((z - over(mean, z)).mul_(over(grad_loss * factor, z)))


def _normalised(features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Rows centred and divided by their length, zero where they do not count; and the lengths (N, 1)."""
    centred = features - features.mean(1, keepdim=True)
    norm = centred.norm(dim=1, keepdim=True)
    return torch.where(counts.unsqueeze(1), centred / (norm + EPS), 0), norm


def statistics(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased std (N, C) over the positions."""
    dims = tuple(range(2, z.dim()))
    positions = z.shape[2:].numel()
    # From a value of the channel, so that the std of a constant is 0; where that value lies far from the others, the
    # mean is a digit off, which its own differences make good.
    first = z
    for _ in dims:
        first = first[..., 0]
    origin = first.to(_wide(z))
    mean = origin + (z - over(origin, z)).mean(dims)
    difference = z - over(mean, z)
    correction = difference.mean(dims)
    squares = difference.square_().sum(dims).sub_(correction.square() * positions).clamp_(min=0)
    return mean + correction, squares.div_(positions - 1).sqrt_()


def _wide(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


def over(values: Tensor, z: Tensor) -> Tensor:
    """A value per image and channel, to be broadcast over the map."""
    return values.view(*z.shape[:2], *(1,) * (z.dim() - 2))

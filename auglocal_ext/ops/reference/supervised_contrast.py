"""Supervised contrast in plain PyTorch, some rows of the matrix of pairs at a time, the gradient made in forward.

What every provider does:

- **256 rows of the matrix of pairs exist at a time**, whatever the device. The library makes the products, one kernel
  replaces a row of them by the loss's gradient G, and the library multiplies it by the features: G z for the rows of
  the block and G^T z for all.
- **The number of anchors is divided out last.** Everything is linear in it, so it goes into the last pass, through
  the normalisation, and no pass over the pairs is spent on counting.
- **Only the gradient of the features is stored**, (N, D) in float32. ``MemoryMeter`` does not see the block of pairs,
  which the op allocates and frees inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

Outputs = tuple[Tensor, Tensor]

EPS = 1e-12  # least norm, as in F.normalize
ROWS = 256  # of the matrix of pairs that exist at a time; csrc/supervised_contrast.h has the same number


def forward(
    features: Tensor,  # (N, D)
    target: Tensor,  # labels, (N,) int64
    temperature: float,
    ignore_index: int,
    need_grad: bool,
) -> Outputs:
    """loss () and d loss / d features (N, D).

    With z_i = f_i / max(|f_i|, eps), s_ia = z_i z_a / t, C the images of another label than ignore_index, P(i) the
    others of C that have i's label, and A the images of C with P(i) not empty:

        p_ia = exp(s_ia) / sum_{b in C, b != i} exp(s_ib)    for a in C, a != i, else 0
        loss = sum_{i in A} mean_{a in P(i)} -log p_ia / max(|A|, 1)
        G_ia = p_ia - [a in P(i)] / |P(i)|    for i in A, else 0
        dz   = (G z + G^T z) / (t max(|A|, 1))
        df_i = (dz_i - z_i (z_i dz_i)) / |f_i|,    dz_i / eps where |f_i| < eps

    |A| is known after the last row of G, and everything is linear in 1 / |A|, so that it comes last. Everything is
    computed and returned in float32 (float64 for double features). A gradient nobody needs has no elements.
    """
    wide = features.to(torch.float64 if features.dtype == torch.float64 else torch.float32).contiguous()
    norm = wide.norm(dim=1, keepdim=True)
    z = wide / norm.clamp(min=EPS)
    counted = target != ignore_index
    dz = torch.zeros_like(z) if need_grad else z.new_empty(0)
    losses, anchors = z.new_empty(len(z)), torch.empty_like(counted)
    for first in range(0, len(z), ROWS):
        rows = slice(first, first + ROWS)
        g, losses[rows], anchors[rows] = _rows(z, target, counted, first, temperature)
        if need_grad:
            dz[rows].addmm_(g, z)
            dz.addmm_(g.t(), z[rows])
    count = anchors.sum().clamp(min=1)
    loss = losses.sum() / count
    if not need_grad:
        return loss, dz
    inner = (dz * z).sum(1, keepdim=True)
    dz.sub_(torch.where(norm < EPS, 0, z * inner)).div_(norm.clamp(min=EPS)).div_(count).div_(temperature)
    return loss, dz


def _rows(z: Tensor, target: Tensor, counted: Tensor, first: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """G of the rows from ``first``, (rows, N); their losses, 0 where they are no anchors; whether they are anchors."""
    rows = slice(first, first + ROWS)
    products = z[rows] @ z.t()
    others = counted.repeat(len(products), 1)
    others.diagonal(first).fill_(False)
    positive = (target[rows, None] == target) & others & counted[rows, None]
    count = positive.sum(1, keepdim=True)
    anchor = count > 0
    products.masked_fill_(~others, float("-inf"))
    shifted = products.sub_(products.amax(1, keepdim=True)).div_(temperature)
    mean = shifted.masked_fill(~positive, 0).sum(1, keepdim=True).div_(count)
    exponentials = shifted.exp_()
    total = exponentials.sum(1, keepdim=True)
    losses = (total.log() - mean).masked_fill_(~anchor, 0)
    g = exponentials.div_(total).sub_(positive.to(z.dtype).div_(count)).masked_fill_(~anchor, 0)
    return g, losses.squeeze(1), anchor.squeeze(1)

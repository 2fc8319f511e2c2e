"""How alike the representations of two networks are: minibatch centred kernel alignment (CKA).

CKA is a sum over minibatches of inner products of U-centred similarity matrices (the unbiased HSIC), in fp64. Its
value does not depend on the minibatch size, unlike the usual, biased estimate. Test images are shuffled first: those
of a folder are sorted by class, and within one class all images are alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import evaluating
from ..training.progress_bar import progress_bar
from .features import layer_names, layer_outputs

MINIBATCH = 256
"""Images whose similarities are compared at a time. The estimate is unbiased whatever their number."""

LEAST = 4
"""Images below which the unbiased estimator is undefined."""


@dataclass(frozen=True)
class CKA:
    """``matrix[i, j]``: linear CKA of layer i of one network and layer j of another, fp64 on the CPU.

    NaN where a layer puts out the same for all images.

    Attributes:
        names_a: names of the rows, one per layer of the first network.
        names_b: names of the columns.
        matrix: ``(A, B)``.
        images: number of images compared.
    """

    names_a: tuple[str, ...]
    names_b: tuple[str, ...]
    matrix: Tensor
    images: int

    @property
    def matched(self) -> Tensor:
        """Of each layer and the one at its place in the other network, (min(A, B),)."""
        return self.matrix.diagonal()


def cka(
    a: nn.Module,
    b: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    images: int | None = None,
    bars: bool = False,
) -> CKA:
    """Linear CKA of every layer of ``a`` with every layer of ``b``.

    ::

        CKA(K, L) = mean HSIC(K, L) / sqrt(mean HSIC(K, K) mean HSIC(L, L)),   K = X X^T, L = Y Y^T

    X (n, features) and Y are two layers' flattened outputs for a minibatch of n images, HSIC is the unbiased estimator
    ("HSIC_1": similarities of images with themselves count nowhere), and means run over the minibatches, weighted by
    their images. So the figure does not depend on the size of the minibatches, beyond its scatter, and memory does not
    grow with the data. 1 is a layer and itself, or its rotation and scaling; about 0 are unrelated ones; estimates
    of small values may be negative.

    Protocol: both networks in eval mode, minibatches of 256 images at most, similarities and their sums in fp64 of
    outputs in the network's own dtype; a rest of fewer than 4 images is left out. The protocol of AugLocal's figures
    is not published; this one is Nguyen et al.'s.

    Args:
        a: one network, a :class:`auglocal_ext.LocalSequential` or ``nn.Sequential``.
        b: the other network; the same object compares a network with itself.
        batches: of images ``(N, *input_shape)`` and labels, which are not used. Shuffle them: HSIC compares images
            within a minibatch, and a minibatch of one class is unlike the others.
        images: stop after so many; None for all there are.
        bars: show a progress bar where standard error is a terminal.

    Raises:
        TypeError: for a network of another kind.
        ValueError: if there is no minibatch of at least 4 images.

    Source: Nguyen, Raghu and Kornblith, Do Wide and Deep Networks Learn the Same Things?, ICLR 2021; HSIC_1 of Song et
    al., Feature Selection via Dependence Maximization, JMLR 2012.
    """
    names_a, names_b = layer_names(a), layer_names(b)
    cross = torch.zeros(len(names_a), len(names_b), dtype=torch.float64)
    own_a, own_b = torch.zeros(len(names_a), dtype=torch.float64), torch.zeros(len(names_b), dtype=torch.float64)
    seen = 0
    with evaluating(a, b), progress_bar(images, "CKA", "image", bars) as bar:
        for minibatch in _minibatches(batches, images):
            count = len(minibatch)
            weight = 1 / (count - 3)  # of HSIC_1, count (count - 3) below the product, as often as there are images
            kernels_a = _centred_similarities(a, minibatch)
            kernels_b = kernels_a if b is a else _centred_similarities(b, minibatch).to(kernels_a.device)
            cross += (weight * kernels_a @ kernels_b.T).cpu()
            own_a += (weight * kernels_a.square().sum(1)).cpu()
            own_b += (weight * kernels_b.square().sum(1)).cpu()
            seen += count
            bar.update(count)
    if seen == 0:
        raise ValueError(f"CKA needs a minibatch of at least {LEAST} images, and there was none")
    return CKA(names_a, names_b, cross / (own_a[:, None] * own_b).sqrt(), seen)


def _minibatches(batches: Iterable[tuple[Tensor, Tensor]], images: int | None) -> Iterable[Tensor]:
    left = images
    for x, _ in batches:
        if left is not None:
            x = x[:left]
            left -= len(x)
        yield from (part for part in x.split(MINIBATCH) if len(part) >= LEAST)
        if left == 0:
            return


def _centred_similarities(network: nn.Module, x: Tensor) -> Tensor:
    """(layers, n^2) fp64: each layer's similarities of images, U-centred.

    The inner product of two U-centred matrices, over n (n - 3), is HSIC_1 (Szekely and Rizzo, Partial Distance
    Correlation, Annals of Statistics 2014).
    """
    parameter = next(network.parameters())
    return torch.stack([_u_centred(h).flatten() for h in layer_outputs(network, x.to(parameter.device))])


def _u_centred(h: Tensor) -> Tensor:
    features = h.flatten(1).double()
    features = features - features.mean(0)  # changes nothing in exact arithmetic, and keeps the products small
    kernel = features @ features.T
    count = len(kernel)
    kernel.fill_diagonal_(0)
    rows = kernel.sum(1) / (count - 2)
    kernel += rows.sum() / (count - 1) - rows[:, None] - rows
    return kernel.fill_diagonal_(0)

"""Whatever the order of threads and blocks, an op's results are the same to the bit.

Runs under the plugin ``emulated`` only: see test_without_gpu.py.
"""

from __future__ import annotations

from collections.abc import Callable

import column
import emulated
import pytest
import torch
from torch import Tensor

from auglocal_ext.ops import (
    batch_norm_act,
    batch_norm_act_max_pool,
    layer_norm,
    pooled_cross_entropy,
    reconstruction_loss,
    similarity_loss,
    supervised_contrast,
)

SEEDS = 100
FOR_RACES = range(3)
IGNORE = -100


def gradients(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


def target(images: int, classes: int) -> Tensor:
    labels = torch.arange(images) % classes
    labels[1::7] = IGNORE
    return labels


def norm(x: Tensor) -> list[Tensor]:
    weight, bias = torch.rand(2, x.shape[1], requires_grad=True).unbind()
    mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    residual = x.detach().roll(1, 0).requires_grad_()
    y = batch_norm_act(x, weight, bias, mean, var, residual=residual, training=True, provider="cuda")
    grads = torch.autograd.grad(y, (x, weight, bias, residual), y.detach().roll(1, 0))
    return [y.detach(), mean, var, *grads]


def norm_pool(x: Tensor) -> list[Tensor]:
    weight, bias = torch.rand(2, x.shape[1], requires_grad=True).unbind()
    mean, var = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    y = batch_norm_act_max_pool(x, weight, bias, mean, var, training=True, provider="cuda")
    return [y.detach(), mean, var, *torch.autograd.grad(y, (x, weight, bias), y.detach().roll(1, 0))]


def rows(x: Tensor) -> list[Tensor]:
    rows = x.flatten(2).mT  # those of the channels-last layout lie together
    weight, bias = torch.rand(2, rows.shape[-1], requires_grad=True).unbind()
    residual = rows.detach().roll(1, 0).requires_grad_()
    found = layer_norm(rows, weight, bias, residual=residual, provider="cuda")
    grads = torch.autograd.grad(found, (x, weight, bias, residual), [tensor.detach().roll(1, 0) for tensor in found])
    return [*(tensor.detach() for tensor in found), *grads]


def pooled(x: Tensor) -> list[Tensor]:
    weight, bias = (torch.randn(size).to(x.dtype).requires_grad_() for size in ((40, x.shape[1]), (40,)))
    found = pooled_cross_entropy(x, weight, bias, target(len(x), 40), label_smoothing=0.1, provider="cuda")
    return [found.logits.detach(), found.correct, *gradients(found.loss, x, weight, bias)]


def reconstruction(x: Tensor) -> list[Tensor]:
    mean, std = torch.rand(2, x.shape[1]).unbind()
    return gradients(reconstruction_loss(x, torch.randn_like(x), mean, std, provider="cuda"), x)


def similarity(x: Tensor) -> list[Tensor]:
    return gradients(similarity_loss(x, target(len(x), 5), 5, provider="cuda"), x)


def contrast(x: Tensor) -> list[Tensor]:
    features = x.flatten(1)
    return gradients(supervised_contrast(features, target(len(x), 5), 0.2, provider="cuda"), x)


# Shapes of which every launch that can has several blocks, and every reduction partial sums of several blocks.
OPS: dict[str, tuple[Callable[[Tensor], list[Tensor]], tuple[int, ...]]] = {
    "batch_norm_act": (norm, (80, 8, 6, 5)),
    "batch_norm_act_max_pool": (norm_pool, (24, 8, 9, 8)),
    "layer_norm": (rows, (4, 136, 3, 4)),
    "pooled_cross_entropy": (pooled, (20, 40, 3, 4)),
    "reconstruction_loss": (reconstruction, (20, 3, 9, 8)),
    "similarity_loss": (similarity, (20, 40, 3, 4)),
    "supervised_contrast": (contrast, (20, 40, 1, 1)),
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_bits_in_any_order(op: str, dtype: torch.dtype, layout: str) -> None:
    run, shape = OPS[op]
    x = column.LAYOUTS[layout](torch.randn(shape).to(dtype)).requires_grad_()

    def bits(seed: int | None) -> list[Tensor]:
        torch.manual_seed(0)
        emulated.runtime.set_seed(seed)
        emulated.runtime.detect_races(seed in FOR_RACES)  # a race is found whatever the order
        return run(x)

    expected = bits(None)  # one thread after the other, one block after the other
    for seed in range(SEEDS):
        for index, (found, wanted) in enumerate(zip(bits(seed), expected, strict=True)):
            assert torch.equal(found, wanted), f"result {index} of {op} differs with seed {seed}"

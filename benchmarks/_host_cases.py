"""What `host.py` measures: fused ops and networks with the layers that they take the place of, at a tiny shape."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from _kernel_cases import contrast, match, reconstruct
from torch import Tensor, nn

from auglocal_ext import fuse, models
from auglocal_ext.nn import BatchNormAct2d
from auglocal_ext.ops import (
    batch_norm_act,
    batch_norm_act_max_pool,
    layer_norm,
    linear_cross_entropy,
    pooled_cross_entropy,
    reconstruction_loss,
    similarity_loss,
    supervised_contrast,
)

WIDTH, CLASSES = 8, 10


class Side(NamedTuple):
    """``forward`` returns a loss, or one or more maps; ``leaves`` are what gradients are taken for."""

    forward: Callable[[], Any]
    leaves: tuple[Tensor, ...]


@dataclass(frozen=True)
class Pair:
    """Two sides with the same results. ``grads`` are the gradients of their maps, None for a loss."""

    name: str
    replaces: str
    fused: Side
    eager: Side
    grads: tuple[Tensor, ...] | None = None


def pairs(device: str) -> list[Pair]:
    """One for each way in which the ops are used, in fp32. Seeds torch's generators."""
    torch.manual_seed(0)
    with torch.device(device):
        return [*_row_norms(), *_batch_norms(), *_losses(), *_networks()]


def _leaf(*shape: int) -> Tensor:
    return torch.randn(shape, requires_grad=True)


def _pair(
    name: str,
    replaces: str,
    leaves: tuple[Tensor, ...],
    fused: Callable[[], Any],
    eager: Callable[[], Any],
    *grads: Tensor,
) -> Pair:
    """Of sides that read the same parameters."""
    return Pair(name, replaces, Side(fused, leaves), Side(eager, leaves), grads or None)


def _row_norms() -> list[Pair]:
    x, residual, grad = _leaf(4, WIDTH), _leaf(4, WIDTH), torch.randn(4, WIDTH)
    layer, rms = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH, eps=1e-5)
    weight, bias, scale = layer.weight, layer.bias, rms.weight

    def fused() -> tuple[Tensor, Tensor]:
        return layer_norm(x, weight, bias, residual=residual)

    def eager() -> tuple[Tensor, Tensor]:
        total = x + residual
        return layer(total), total

    leaves, of_rms = (x, weight, bias), (x, scale)
    return [
        _pair("layer_norm", "LayerNorm", leaves, lambda: layer_norm(x, weight, bias), lambda: layer(x), grad),
        _pair("layer_norm, residual", "addition, LayerNorm", (*leaves, residual), fused, eager, grad, grad),
        _pair("layer_norm, RMS", "RMSNorm", of_rms, lambda: layer_norm(x, scale, rms=True), lambda: rms(x), grad),
    ]


def _batch_norms() -> list[Pair]:
    x, residual, grad, pooled = (torch.randn(4, WIDTH, size, size) for size in (4, 4, 4, 2))
    norm, act, pool, module = nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.MaxPool2d(3, 2, 1), BatchNormAct2d(WIDTH)
    state = norm.weight, norm.bias, norm.running_mean, norm.running_var
    others: dict[str, Any] = {"num_batches_tracked": norm.num_batches_tracked, "training": True}
    inputs, both = (x.requires_grad_(),), (x, residual.requires_grad_())

    def op() -> Tensor:
        return batch_norm_act(x, *state, **others)

    def op_added() -> Tensor:
        return batch_norm_act(x, *state, residual=residual, **others)

    def eager() -> Tensor:
        return act(norm(x))

    def eager_added() -> Tensor:
        return act(norm(x) + residual)

    def module_pair(name: str, replaces: str, inputs: tuple[Tensor, ...], eager: Callable[[], Tensor]) -> Pair:
        ours, theirs = ((*inputs, *part.parameters()) for part in (module, norm))
        return Pair(name, replaces, Side(lambda: module(*inputs), ours), Side(eager, theirs), (grad,))

    layers, more, parameters = "BatchNorm2d, ReLU", "BatchNorm2d, addition, ReLU", state[:2]
    return [
        _pair("batch_norm_act", layers, (*inputs, *parameters), op, eager, grad),
        _pair("batch_norm_act, residual", more, (*both, *parameters), op_added, eager_added, grad),
        module_pair("BatchNormAct2d", layers, inputs, eager),
        module_pair("BatchNormAct2d, residual", more, both, eager_added),
        _pair(
            "batch_norm_act_max_pool",
            f"{layers}, MaxPool2d",
            (*inputs, *parameters),
            lambda: batch_norm_act_max_pool(x, *state, **others),
            lambda: pool(act(norm(x))),
            pooled,
        ),
    ]


def _losses() -> list[Pair]:
    """Losses that are no module of torch stand beside the formulas of `kernels.py`."""
    x, features, logits = _leaf(4, WIDTH), _leaf(4, WIDTH, 4, 4), _leaf(4, 3, 4, 4)
    image, mean, std = torch.randn(4, 3, 4, 4), torch.full((3,), 0.5), torch.full((3,), 0.25)
    target = torch.tensor([0, 1, 0, 2])
    linear, criterion, pool = nn.Linear(WIDTH, CLASSES), nn.CrossEntropyLoss(), nn.AdaptiveAvgPool2d(1)
    weight, bias = linear.weight, linear.bias

    def classify(h: Tensor) -> Tensor:
        scores = linear(h)
        (scores.detach().argmax(1) == target).sum()  # the ops count hits too
        return criterion(scores, target)

    formula = "its formula in PyTorch"
    return [
        _pair(
            "linear_cross_entropy",
            "Linear, CrossEntropyLoss, hits",
            (x, weight, bias),
            lambda: linear_cross_entropy(x, weight, bias, target).loss,
            lambda: classify(x),
        ),
        _pair(
            "pooled_cross_entropy",
            "AdaptiveAvgPool2d, Linear, CrossEntropyLoss, hits",
            (features, weight, bias),
            lambda: pooled_cross_entropy(features, weight, bias, target).loss,
            lambda: classify(pool(features).flatten(1)),
        ),
        _pair(
            "reconstruction_loss",
            formula,
            (logits,),
            lambda: reconstruction_loss(logits, image, mean, std),
            lambda: reconstruct(logits, image, mean, std)[0],
        ),
        _pair(
            "similarity_loss",
            formula,
            (features,),
            lambda: similarity_loss(features, target, CLASSES),
            lambda: match(features, target)[0],
        ),
        _pair(
            "supervised_contrast",
            formula,
            (x,),
            lambda: supervised_contrast(x, target, 0.07),
            lambda: contrast(x, target)[0],
        ),
    ]


def _networks() -> list[Pair]:
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()]
    gpt2 = models.gpt(1, WIDTH, 2, 4, 4, norm="layer", positions="learned", mlp="gelu", bias=True)
    llama = models.gpt(1, WIDTH, 2, 4, 4)
    return [
        _fused("fuse, 8 convolutions", "Conv2d, BatchNorm2d, ReLU", nn.Sequential(*layers), _leaf(4, WIDTH, 4, 4)),
        _fused("fuse, block of GPT-2", "block, LayerNorm and GELU", nn.Sequential(gpt2.block_0), _leaf(1, 4, WIDTH)),
        _fused("fuse, block of Llama", "block, RMSNorm and SwiGLU", nn.Sequential(llama.block_0), _leaf(1, 4, WIDTH)),
    ]


def _fused(name: str, replaces: str, network: nn.Sequential, x: Tensor) -> Pair:
    ours = copy.deepcopy(network)
    fuse(ours)
    fused, eager = (Side(partial(net, x), (x, *net.parameters())) for net in (ours, network))
    return Pair(name, replaces, fused, eager, (torch.randn_like(x),))

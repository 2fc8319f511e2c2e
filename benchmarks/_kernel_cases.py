"""What `kernels.py` measures: for each op its shapes, the composition it stands for, and the op itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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


@dataclass(frozen=True)
class Case:
    """One op at one shape. Both functions take ``inputs``, ``fused`` a provider as well.

    What they return first is differentiated: a loss, or a map with the upstream gradient ``grad``.
    """

    op: str
    shape: str
    inputs: tuple[Any, ...]
    composition: Callable[..., tuple[Tensor, ...]]
    fused: Callable[..., tuple[Tensor, ...]]
    bytes: int  # that any implementation has to move: inputs read once, results written once
    dtype: torch.dtype
    grad: Tensor | None = None


# (batch, channels, height, width), classes: ends of the stages of the CIFAR and the ImageNet ResNets
_MAPS = {
    "cuda": [
        ((1024, 16, 32, 32), 10),
        ((1024, 32, 16, 16), 10),
        ((1024, 64, 8, 8), 10),
        ((256, 256, 56, 56), 1000),
        ((256, 1024, 14, 14), 1000),
        ((256, 2048, 7, 7), 1000),
    ],
    "cpu": [((64, 16, 32, 32), 10), ((64, 64, 8, 8), 10), ((16, 512, 7, 7), 1000)],
}


def _pooled_cross_entropy(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for (images, channels, *positions), classes in _MAPS[device]:
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(images, channels, *positions, device=device).to(dtype, memory_format=layout)
            weight = (torch.randn(classes, channels, device=device) / channels**0.5).to(dtype)
            bias = torch.zeros(classes, device=device, dtype=dtype)
            target = torch.randint(classes, (images,), device=device)
            for tensor in (x, weight, bias):
                tensor.requires_grad_()
            name = "channels-last" if layout == torch.channels_last else "contiguous"
            yield Case(
                op="pooled_cross_entropy",
                shape=f"{images}x{channels}x{'x'.join(map(str, positions))} -> {classes}, {name}",
                inputs=(x, weight, bias, target),
                composition=_composition,
                fused=_fused,
                # the map and both parameters in; logits, the gradient per image and channel, the parameters' out
                bytes=(x.numel() + 2 * weight.numel() + 2 * bias.numel() + images * channels) * x.element_size()
                + images * (classes * 4 + 8),
                dtype=dtype,
            )


def _composition(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    logits = F.linear(F.adaptive_avg_pool2d(x, 1).flatten(1), weight, bias)
    return F.cross_entropy(logits, target), (logits.detach().argmax(1) == target).sum()


def _fused(x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, provider: str) -> tuple[Tensor, ...]:
    out = pooled_cross_entropy(x, weight, bias, target, provider=provider, check_labels=False)
    return out.loss, out.correct


# tokens, features, vocabulary: the readouts of small language models
_READOUTS = {"cuda": [(16384, 1024, 32000), (16384, 512, 256)], "cpu": [(512, 512, 8192), (2048, 256, 256)]}


def _linear_cross_entropy(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for rows, width, classes in _READOUTS[device]:
        x = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
        weight = (torch.randn(classes, width, device=device) / width**0.5).to(dtype).requires_grad_()
        yield Case(
            op="linear_cross_entropy",
            shape=f"{rows}x{width} -> {classes}",
            inputs=(x, weight, torch.randint(classes, (rows,), device=device)),
            composition=_read_out,
            fused=_fused_read_out,
            # hidden states and weight in, their gradients out; the logits need not be in memory
            bytes=2 * (x.numel() + weight.numel()) * x.element_size() + rows * 8,
            dtype=dtype,
        )


def _read_out(x: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    logits = F.linear(x, weight)
    return F.cross_entropy(logits.float(), target), (logits.detach().argmax(1) == target).sum()


def _fused_read_out(x: Tensor, weight: Tensor, target: Tensor, provider: str) -> tuple[Tensor, ...]:
    out = linear_cross_entropy(x, weight, None, target, provider=provider, check_labels=False)
    return out.loss, out.correct


# tokens, features: between the layers of vision transformers and of small language models. On a CPU torch adds the
# gradients of weight and bias up in bf16, so that of many tokens they would be no reference.
_TOKENS = {"cuda": [(50432, 768), (16384, 1024), (16384, 4096)], "cpu": [(512, 384), (512, 1024)]}


def _layer_norm(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for (rows, width), rms in product(_TOKENS[device], (False, True)):
        x, residual = (torch.randn(rows, width, device=device).to(dtype).requires_grad_() for _ in range(2))
        weight, bias = (factor.to(dtype).requires_grad_() for factor in _factors(width, device))
        yield Case(
            op="layer_norm",
            shape=f"{rows}x{width}, {'RMS' if rms else 'layer'}, residual",
            inputs=(x, residual, weight, None if rms else bias),
            composition=_normalise_rows,
            fused=_fused_normalise_rows,
            # x, residual, the sum and y; then the sum, the gradient of y and that of x
            bytes=7 * x.numel() * x.element_size(),
            dtype=dtype,
            grad=torch.randn(rows, width, device=device).to(dtype),
        )


def _normalise_rows(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
    total = x + residual
    if bias is None:
        return F.rms_norm(total, weight.shape, weight, 1e-5), total
    return F.layer_norm(total, weight.shape, weight, bias, 1e-5), total


def _fused_normalise_rows(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, provider: str
) -> tuple[Tensor, ...]:
    y, total = layer_norm(x, weight, bias, residual=residual, rms=bias is None, provider=provider)
    return y, total


# (batch, channels, height, width): inside the stages of the CIFAR ResNets, stage 1 and the stem of the ImageNet ones
_NORMALISED = {
    "cuda": [
        (1024, 16, 32, 32),
        (1024, 32, 16, 16),
        (1024, 64, 8, 8),
        (256, 64, 56, 56),
        (256, 256, 56, 56),
        (128, 64, 112, 112),
    ],
    "cpu": [(64, 16, 32, 32), (64, 64, 8, 8), (8, 64, 56, 56)],
}


def _factors(channels: int, device: str) -> tuple[Tensor, Tensor]:
    """Weight and bias of a norm, the weight off zero: BatchNorm would make equal values, whose maximum is a tie."""
    return torch.rand(channels, device=device) + 0.5, torch.randn(channels, device=device)


def _keep_off_the_edge(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> None:
    """Moves, in place, what the activation would see as next to zero, where rounding decides whether it lets it pass.

    One element on the other side of the mask is seen in a gradient that sums over all positions.
    """
    edge = max(1e-4, 4 * torch.finfo(x.dtype).eps)
    y = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), True)
    moved = x if residual is None else residual
    moved += 8 * edge * ((y if residual is None else y + residual).abs() < edge)


def _batch_norm_act(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for shape, layout, with_residual in product(
        _NORMALISED[device], (torch.contiguous_format, torch.channels_last), (False, True)
    ):
        x, grad, residual = (torch.randn(shape, device=device).to(dtype, memory_format=layout) for _ in range(3))
        weight, bias = _factors(shape[1], device)
        running = torch.zeros(shape[1], device=device), torch.ones(shape[1], device=device)
        _keep_off_the_edge(x, weight, bias, residual if with_residual else None)
        leaves = (x, weight, bias, residual if with_residual else None)
        for tensor in leaves:
            if tensor is not None:
                tensor.requires_grad_()
        name = "channels-last" if layout == torch.channels_last else "contiguous"
        # The sums over all positions come before the first result, so x is read twice forward, and x and the gradient
        # (and for the mask the residual) twice backward; the residual is read once forward; each result is written.
        passes = 12 if with_residual else 8
        yield Case(
            op="batch_norm_act",
            shape=f"{'x'.join(map(str, shape))}{' + residual' if with_residual else ''}, {name}",
            inputs=(*leaves, *running),
            composition=_normalise,
            fused=_fused_normalise,
            bytes=passes * x.numel() * x.element_size(),
            dtype=dtype,
            grad=grad,
        )


def _normalise(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor
) -> tuple[Tensor, ...]:
    y = F.batch_norm(x, mean, var, weight, bias, True)
    return (F.relu(y if residual is None else y + residual),)


def _fused_normalise(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, mean: Tensor, var: Tensor, provider: str
) -> tuple[Tensor, ...]:
    return (batch_norm_act(x, weight, bias, mean, var, residual=residual, training=True, provider=provider),)


# (batch, channels, height, width): the stem of the ImageNet ResNets, whose pooling is 3x3 with stride 2 and padding 1
_STEMS = {"cuda": [(128, 64, 112, 112)], "cpu": [(4, 64, 56, 56)]}


def _batch_norm_act_max_pool(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for shape, layout in product(_STEMS[device], (torch.contiguous_format, torch.channels_last)):
        images, channels, height, width = shape
        x = torch.randn(shape, device=device).to(dtype, memory_format=layout)
        grad = torch.randn(images, channels, height // 2, width // 2, device=device).to(dtype, memory_format=layout)
        weight, bias = _factors(channels, device)
        _keep_off_the_edge(x, weight, bias)
        running = torch.zeros(channels, device=device), torch.ones(channels, device=device)
        for tensor in (x, weight, bias):
            tensor.requires_grad_()
        name = "channels-last" if layout == torch.channels_last else "contiguous"
        yield Case(
            op="batch_norm_act_max_pool",
            shape=f"{'x'.join(map(str, shape))}, {name}",
            inputs=(x, weight, bias, *running),
            composition=_pool,
            fused=_fused_pool,
            # As for batch_norm_act x is read twice forward and twice backward; its gradient and the result are
            # written; the upstream gradient is read twice, the byte of each maximum written once and read twice.
            bytes=5 * x.numel() * x.element_size() + grad.numel() * (3 * x.element_size() + 3),
            dtype=dtype,
            grad=grad,
        )


def _pool(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, ...]:
    return (F.max_pool2d(F.relu(F.batch_norm(x, mean, var, weight, bias, True)), 3, 2, 1),)


def _fused_pool(
    x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, provider: str
) -> tuple[Tensor, ...]:
    return (batch_norm_act_max_pool(x, weight, bias, mean, var, training=True, provider=provider),)


# (batch, channels, height, width): images of CIFAR, STL-10 and ImageNet
_IMAGES = {"cuda": [(1024, 3, 32, 32), (256, 3, 96, 96), (256, 3, 224, 224)], "cpu": [(64, 3, 32, 32), (8, 3, 96, 96)]}


def _reconstruction_loss(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for shape, layout in product(_IMAGES[device], (torch.contiguous_format, torch.channels_last)):
        logits = torch.randn(shape, device=device).to(dtype, memory_format=layout).requires_grad_()
        image = torch.randn(shape, device=device).to(memory_format=layout)
        mean, std = (torch.tensor(values, device=device) for values in ((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)))
        name = "channels-last" if layout == torch.channels_last else "contiguous"
        yield Case(
            op="reconstruction_loss",
            shape=f"{'x'.join(map(str, shape))}, {name}",
            inputs=(logits, image, mean, std),
            composition=reconstruct,
            fused=_fused_reconstruct,
            grad=torch.tensor(2.0**14, device=device),  # a loss scale: without it fp16's gradients are subnormal
            # Logits and image in and the gradient out; the factor of the loss comes after it, so the gradient is read
            # and written once more.
            bytes=logits.numel() * (4 * logits.element_size() + image.element_size()),
            dtype=dtype,
        )


def reconstruct(logits: Tensor, image: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, ...]:
    pixels = (image * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)).clamp(0, 1)
    return (F.binary_cross_entropy_with_logits(logits.float(), pixels),)


def _fused_reconstruct(logits: Tensor, image: Tensor, mean: Tensor, std: Tensor, provider: str) -> tuple[Tensor, ...]:
    return (reconstruction_loss(logits, image, mean, std, provider=provider),)


# (batch, channels, height, width): what PredSim's convolutions make of the stages of the CIFAR ResNets
_MATCHED = {
    "cuda": [(1024, 16, 32, 32), (1024, 32, 16, 16), (1024, 64, 8, 8)],
    "cpu": [(64, 16, 32, 32), (64, 64, 8, 8)],
}


def _similarity_loss(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for shape, layout in product(_MATCHED[device], (torch.contiguous_format, torch.channels_last)):
        # Deviations that differ from channel to channel: of equal ones the similarity is rounding.
        z = torch.randn(shape, device=device) * (torch.rand(*shape[:2], 1, 1, device=device) + 0.1)
        z = z.to(dtype, memory_format=layout).requires_grad_()
        name = "channels-last" if layout == torch.channels_last else "contiguous"
        yield Case(
            op="similarity_loss",
            shape=f"{'x'.join(map(str, shape))} -> 10, {name}",
            inputs=(z, torch.randint(10, shape[:1], device=device)),
            composition=match,
            fused=_fused_match,
            # The gradient needs the loss, so the map is read twice, and once written; the rest is small.
            bytes=3 * z.numel() * z.element_size(),
            dtype=dtype,
        )


def match(z: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    return (F.mse_loss(_similarity(z.float().flatten(2).std(2)), _similarity(F.one_hot(target, 10).float())),)


def _similarity(features: Tensor) -> Tensor:
    centred = features - features.mean(1, keepdim=True)
    unit = centred / (centred.norm(dim=1, keepdim=True) + 1e-8)
    return (unit @ unit.t()).clamp(-1, 1)


def _fused_match(z: Tensor, target: Tensor, provider: str) -> tuple[Tensor, ...]:
    return (similarity_loss(z, target, 10, provider=provider, check_labels=False),)


# images, features: InfoPro's contrast at the batch sizes of CIFAR
_FEATURES = {"cuda": [(1024, 128), (4096, 128)], "cpu": [(256, 128), (1024, 128)]}


def _supervised_contrast(device: str, dtype: torch.dtype) -> Iterator[Case]:
    for images, width in _FEATURES[device]:
        features = torch.randn(images, width, device=device).to(dtype).requires_grad_()
        yield Case(
            op="supervised_contrast",
            shape=f"{images}x{width}",
            inputs=(features, torch.randint(10, (images,), device=device)),
            composition=contrast,
            fused=_fused_contrast,
            bytes=2 * features.numel() * features.element_size() + images * 8,  # the pairs need not be in memory
            dtype=dtype,
        )


def contrast(features: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    z = F.normalize(features.float(), dim=1)
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    positive = (target[:, None] == target) & ~itself
    logits = (z @ z.t() / 0.07).masked_fill(itself, torch.finfo(z.dtype).min)
    log_probability = (logits - logits.logsumexp(1, keepdim=True)).masked_fill(~positive, 0)
    positives = positive.sum(1)
    return (-(log_probability.sum(1) / positives.clamp(min=1)).sum() / (positives > 0).sum().clamp(min=1),)


def _fused_contrast(features: Tensor, target: Tensor, provider: str) -> tuple[Tensor, ...]:
    return (supervised_contrast(features, target, 0.07, provider=provider),)


_CASES = {
    "batch_norm_act": _batch_norm_act,
    "batch_norm_act_max_pool": _batch_norm_act_max_pool,
    "layer_norm": _layer_norm,
    "linear_cross_entropy": _linear_cross_entropy,
    "pooled_cross_entropy": _pooled_cross_entropy,
    "reconstruction_loss": _reconstruction_loss,
    "similarity_loss": _similarity_loss,
    "supervised_contrast": _supervised_contrast,
}
OPS = tuple(_CASES)


def cases(device: str, dtype: torch.dtype, ops: Sequence[str] = OPS, first_only: bool = False) -> Iterator[Case]:
    """The ops at their shapes (or the first of them): those of the networks on CUDA, small ones on the CPU.

    Seeds torch's generators, so that every run compares and times the same values.
    """
    for op in ops:
        torch.manual_seed(0)
        yield from islice(_CASES[op](device, dtype), 1 if first_only else None)

"""What an op keeps for backward: the same tensors with every provider, to the byte, and results that agree."""

from __future__ import annotations

from collections.abc import Callable

import column
import pytest
import torch
from torch import Tensor

from auglocal_ext import ops
from auglocal_ext.ops import providers

Kept = list[tuple[torch.Size, torch.dtype]]


def _map(dtype: torch.dtype) -> Tensor:
    return torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()


def _vectors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(6, generator=generator).add_(0.5).requires_grad_() for _ in range(2)]


def _labels() -> Tensor:
    return torch.tensor([0, 1, 0, 2])


def _norm(dtype: torch.dtype, provider: str) -> Tensor:
    residual = _map(dtype).detach().flip(0)
    return ops.batch_norm_act(_map(dtype), *_vectors(), None, None, residual=residual, training=True, provider=provider)


def _stem(dtype: torch.dtype, provider: str) -> Tensor:
    return ops.batch_norm_act_max_pool(_map(dtype), *_vectors(), None, None, training=True, provider=provider)


def _head(dtype: torch.dtype, provider: str) -> Tensor:
    weight = torch.randn(3, 6, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    return ops.pooled_cross_entropy(_map(dtype), weight, None, _labels(), label_smoothing=0.1, provider=provider).loss


def _image(dtype: torch.dtype, provider: str) -> Tensor:
    mean, std = torch.full((6,), 0.5), torch.full((6,), 0.25)
    return ops.reconstruction_loss(_map(dtype), _map(torch.float32).detach(), mean, std, provider=provider)


def _rows(dtype: torch.dtype, provider: str) -> Tensor:
    x, vectors = _map(dtype), [vector.detach().repeat(2)[:8].requires_grad_() for vector in _vectors()]
    return ops.layer_norm(x, *vectors, residual=x.detach().flip(0), provider=provider)[0]


CALLS: dict[str, Callable[[torch.dtype, str], Tensor]] = {
    "batch_norm_act": _norm,
    "batch_norm_act_max_pool": _stem,
    "layer_norm": _rows,
    "pooled_cross_entropy": _head,
    "reconstruction_loss": _image,
    "similarity_loss": lambda dtype, provider: ops.similarity_loss(_map(dtype), _labels(), 3, provider=provider),
    "supervised_contrast": lambda dtype, provider: ops.supervised_contrast(
        _map(dtype).flatten(1), _labels(), 0.5, provider=provider
    ),
}


def test_every_op_is_here() -> None:
    assert set(CALLS) == {name for name, table in providers.TABLES.items() if len(table.providers) == 5}


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_every_provider_keeps_the_same(op: str, dtype: torch.dtype) -> None:
    def run(provider: str) -> tuple[Tensor, Kept]:
        kept: Kept = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append((tensor.shape, tensor.dtype))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = CALLS[op](dtype, provider)
        result.sum().backward()
        return result.detach(), kept

    expected, kept = run("reference")
    rows = [row.name for row in providers.TABLES[op].providers if row.serves("cpu") and row.name != "reference"]
    assert "aten" in rows
    for name in rows:
        if name != "triton" and providers.available(name, "cpu"):
            found, mine = run(name)
            assert mine == kept, name
            column.assert_close(name, found, expected, expected.double())

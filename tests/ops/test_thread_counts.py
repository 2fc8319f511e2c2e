"""Bits do not depend on the number of threads, but for torch's matrix products, whose order of additions is its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from auglocal_ext import ops

LOSSES: dict[str, Callable[..., Tensor]] = {
    "supervised_contrast": lambda x, y, provider: ops.supervised_contrast(x, y, 0.1, provider=provider),
    "similarity_loss": lambda x, y, provider: ops.similarity_loss(x, y, 10, provider=provider),
}
SMALL: dict[str, Callable[..., Tensor]] = {
    "similarity_loss": LOSSES["similarity_loss"],
    "pooled_cross_entropy": lambda x, y, provider: (
        ops.pooled_cross_entropy(x, x[:40].detach(), None, y, provider=provider).loss
    ),
}


@pytest.fixture
def products_of_a_fixed_order() -> Iterator[None]:
    def product(a: Tensor, b: Tensor) -> Tensor:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return (a.unsqueeze(2) * b.unsqueeze(0)).sum(1)
        finally:
            torch.set_num_threads(threads)

    threads = torch.get_num_threads()
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("mm", product, "CPU")
        yield
    torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("provider", ["cpu"])
@pytest.mark.parametrize("loss", LOSSES)
def test_what_is_ours_does_not_depend_on_the_number_of_threads(
    loss: str, provider: str, products_of_a_fixed_order: None
) -> None:
    x = torch.randn(300, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = torch.randint(10, (300,), generator=torch.Generator().manual_seed(2))

    def gradient(threads: int) -> Tensor:
        torch.set_num_threads(threads)
        return torch.autograd.grad(LOSSES[loss](x, y, provider), x)[0]

    one = gradient(1)
    assert one.abs().sum() > 0
    for threads in (2, 3, 4):
        assert torch.equal(gradient(threads), one)


@pytest.mark.parametrize("provider", ["cpu"])
@pytest.mark.parametrize("loss", SMALL)
def test_small_products_do_not_depend_on_the_number_of_threads(loss: str, provider: str) -> None:
    x = torch.randn(100, 96, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = torch.randint(10, (100,), generator=torch.Generator().manual_seed(2))
    found, threads = [], torch.get_num_threads()
    for number in (1, 2, 3, 4):
        torch.set_num_threads(number)
        found.append(torch.autograd.grad(SMALL[loss](x, y, provider), x)[0])
    torch.set_num_threads(threads)
    assert found[0].abs().sum() > 0
    assert all(torch.equal(gradient, found[0]) for gradient in found)


@pytest.mark.parametrize("provider", ["cpu"])
def test_sums_over_rows_do_not_depend_on_the_number_of_threads(provider: str) -> None:
    generator = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(1100, 70, generator=generator, requires_grad=True) for _ in range(2))
    weight, bias = (torch.rand(70, generator=generator).requires_grad_() for _ in range(2))
    found, threads = [], torch.get_num_threads()
    for number in (1, 2, 3, 4):
        torch.set_num_threads(number)
        y = ops.layer_norm(x, weight, bias, provider=provider)
        found.append([y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad.detach())])
    torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))

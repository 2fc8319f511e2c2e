"""CKA against its formula and its invariances."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from auglocal_ext import ContSup, LocalSequential, models
from auglocal_ext.analysis import cka
from auglocal_ext.analysis.cka import MINIBATCH


def mlp(seed: int = 0, width: int = 7) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width), nn.Tanh(), nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, 3)).double()


def batches(*sizes: int, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, 5, generator=generator, dtype=torch.float64), torch.zeros(n).long()) for n in sizes]


def hsic(x: torch.Tensor, y: torch.Tensor) -> float:
    """HSIC_1 as Song et al. write it."""
    n = len(x)
    k, m = x @ x.T, y @ y.T
    k.fill_diagonal_(0)
    m.fill_diagonal_(0)
    one = torch.ones(n, dtype=x.dtype)
    value = (
        (k @ m).trace() + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ m @ one)
    )
    return float(value / (n * (n - 3)))


def test_the_formula_over_minibatches_of_unequal_size():
    a, b = mlp(0), mlp(1)
    data = batches(12, 9, 3, 20)  # three images are too few for the estimator
    found = cka(a, b, data)
    assert found.images == 41
    assert found.names_a == found.names_b == ("0", "2", "4")
    stages = (2, 4, 5)
    for i, j in itertools.product(range(3), repeat=2):
        sums = torch.zeros(3, dtype=torch.float64)
        for x, _ in data:
            if len(x) >= 4:
                with torch.no_grad():
                    u, v = a[: stages[i]](x), b[: stages[j]](x)
                sums += len(x) * torch.tensor([hsic(u, v), hsic(u, u), hsic(v, v)], dtype=torch.float64)
        torch.testing.assert_close(found.matrix[i, j], sums[0] / (sums[1] * sums[2]).sqrt(), rtol=1e-10, atol=1e-12)
    assert torch.equal(found.matched, found.matrix.diagonal())


@pytest.mark.parametrize("make", [lambda: models.resnet8(width=4), lambda: None], ids=["resnet", "contsup"])
def test_of_a_network_with_itself(make):
    net = make() or LocalSequential(models.resnet8(width=4), ContSup("R1E"), 10, (3, 16, 16))
    images = [(torch.randn(40, 3, 16, 16) + 3, torch.zeros(40).long())]
    for other in (net, copy.deepcopy(net)):
        found = cka(net, other, images)
        torch.testing.assert_close(found.matched, torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-12)
        assert torch.allclose(found.matrix, found.matrix.T)
        assert (found.matrix <= 1 + 1e-12).all() and found.matrix[0, 4] < 0.99


def test_rotation_scale_and_shift_change_nothing():
    a = mlp(0)
    b = copy.deepcopy(a)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    with torch.no_grad():
        b[4].weight.copy_(-7 * rotation @ a[4].weight)
        b[4].bias.copy_(torch.randn(3) * 100)
    found = cka(a, b, batches(50))
    torch.testing.assert_close(found.matched, torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-9)
    with torch.no_grad():
        b[4].weight.copy_(torch.diag(torch.tensor([9.0, 1.0, 0.1], dtype=torch.float64)) @ a[4].weight)
    assert cka(a, b, batches(50)).matrix[2, 2] < 0.999  # it is not invariant to stretching


def test_unbiased_whatever_the_minibatch():
    """Wide layers and small minibatches: the biased estimator is near 1 here, of layers that have nothing in common."""
    torch.manual_seed(3)
    first = nn.Sequential(nn.Linear(400, 2), nn.Linear(2, 2)).double()
    second = copy.deepcopy(first)
    # Two layers that hand on different halves of the input, which are independent.
    a, b = (nn.Sequential(nn.Linear(400, 200, bias=False), nn.Linear(200, 2)).double() for _ in range(2))
    with torch.no_grad():
        a[0].weight.copy_(torch.eye(400)[:200])
        b[0].weight.copy_(torch.eye(400)[200:])
    data = [(torch.randn(10, 400, dtype=torch.float64), torch.zeros(10).long()) for _ in range(400)]
    assert abs(float(cka(a, b, data).matrix[0, 0])) < 0.02
    # And of networks that have much in common it is that of all images at once.
    whole = [(torch.cat([x for x, _ in data]), torch.zeros(4000).long())]
    with torch.no_grad():
        second[0].weight.copy_(first[0].weight + 0.5 * torch.randn(2, 400).double() / 20)
    small, large = cka(first, second, data), cka(first, second, whole)
    assert large.images == 4000 and 0.3 < float(large.matrix[0, 0]) < 0.95
    assert abs(float(small.matrix[0, 0] - large.matrix[0, 0])) < 0.03


def test_large_batches_are_taken_in_parts():
    a, b = mlp(0), mlp(1)
    ((x, y),) = batches(2 * MINIBATCH + 3)
    found = cka(a, b, [(x, y)])
    assert found.images == 2 * MINIBATCH
    parts = [(part, y[: len(part)]) for part in x[: 2 * MINIBATCH].split(MINIBATCH)]
    assert torch.equal(found.matrix, cka(a, b, parts).matrix)


def test_images_ends_the_pass():
    a, b = mlp(0), mlp(1)
    taken = []

    def stream():
        for batch in batches(10, 10, 10, 10):
            taken.append(batch)
            yield batch

    found = cka(a, b, stream(), images=16)
    assert found.images == 16 and len(taken) == 2
    (x, _), (z, _) = batches(10, 10)
    assert torch.equal(found.matrix, cka(a, b, [(x, None), (z[:6], None)]).matrix)


def test_a_constant_layer_is_nan_and_no_other():
    a, b = mlp(0), mlp(0)
    with torch.no_grad():
        b[2].weight.zero_()
    matrix = cka(a, b, batches(20)).matrix
    assert matrix[:, 1].isnan().all() and matrix[:, 2].isnan().all()
    torch.testing.assert_close(matrix[0, 0], torch.tensor(1.0, dtype=torch.float64))


def test_no_minibatch():
    with pytest.raises(ValueError, match="at least 4 images"):
        cka(mlp(), mlp(), batches(3, 2))


def test_networks_are_left_as_they_were():
    a, b = models.resnet8(width=4).train(), models.resnet8(width=4).eval()
    state = copy.deepcopy(a.state_dict())
    cka(a, b, [(torch.randn(8, 3, 16, 16), torch.zeros(8).long())])
    assert a.training and not b.training
    for name, value in a.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert all(p.grad is None for p in a.parameters())


@pytest.mark.gpu
def test_on_a_gpu():
    a, b = models.resnet8(width=4), models.resnet8(width=4)
    data = [(torch.randn(32, 3, 16, 16), torch.zeros(32).long())]
    on_cpu = cka(a, b, data).matrix
    torch.testing.assert_close(cka(a.cuda(), b.cuda(), data).matrix, on_cpu, rtol=1e-3, atol=1e-3)

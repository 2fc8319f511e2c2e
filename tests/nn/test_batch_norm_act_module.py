"""BatchNormAct1d and 2d beside nn.BatchNorm, add and activation: results, running statistics, state dict."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from auglocal_ext import fuse
from auglocal_ext.nn import BatchNormAct1d, BatchNormAct2d
from auglocal_ext.ops import batch_norm_act

ACTIVATIONS = {"relu": F.relu, "leaky_relu": lambda z: F.leaky_relu(z, 0.2), "none": lambda z: z}


def pair(options: dict[str, Any], **ours: Any) -> tuple[BatchNormAct2d, nn.BatchNorm2d]:
    fused, eager = BatchNormAct2d(6, **options, **ours), nn.BatchNorm2d(6, **options)
    if eager.affine:
        nn.init.normal_(eager.weight)
        nn.init.normal_(eager.bias)
    fused.load_state_dict(eager.state_dict())
    return fused, eager


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"momentum": momentum, "affine": affine, "track_running_stats": tracked}
        for momentum, affine, tracked in itertools.product((0.3, None), (True, False), (True, False))
    ],
    ids=str,
)
def test_does_what_batch_norm_and_activation_do(options: dict[str, Any], activation: str) -> None:
    fused, eager = pair(options, activation=activation, negative_slope=0.2)
    for step in range(5):
        training = step < 3
        fused.train(training)
        eager.train(training)
        x, residual = torch.randn(4, 6, 5, 3) + step, torch.randn(4, 6, 5, 3) if step % 2 else None
        inputs = [[t.clone().requires_grad_() for t in (x, residual) if t is not None] for _ in range(2)]
        ours = fused(*inputs[0])
        theirs = ACTIVATIONS[activation](eager(inputs[1][0]) + (inputs[1][1] if residual is not None else 0))
        grad = torch.randn(x.shape)
        torch.testing.assert_close(ours, theirs)
        found = torch.autograd.grad(ours, [*inputs[0], *fused.parameters()], grad)
        expected = torch.autograd.grad(theirs, [*inputs[1], *eager.parameters()], grad)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(fused.state_dict(), eager.state_dict())


def test_state_dict_and_initialisation_are_those_of_batch_norm() -> None:
    fused, eager = BatchNormAct2d(6), nn.BatchNorm2d(6)
    torch.testing.assert_close(fused.state_dict(), eager.state_dict(), rtol=0, atol=0)
    assert "activation='relu'" in repr(fused)
    eager.load_state_dict(fused.state_dict())


@pytest.mark.parametrize("shape", [(9, 6), (4, 6, 7)])
def test_one_dimension(shape: tuple[int, ...]) -> None:
    fused, eager = BatchNormAct1d(6), nn.BatchNorm1d(6)
    x = torch.randn(shape)
    torch.testing.assert_close(fused(x), F.relu(eager(x)))
    torch.testing.assert_close(fused.state_dict(), eager.state_dict())
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        fused(torch.randn(2, 6, 3, 3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 6, 3, 3), (2, 6, 0, 3)], ids=str)
def test_empty_batches_are_torchs(shape: tuple[int, ...], training: bool) -> None:
    fused, eager = BatchNormAct2d(6).train(training), nn.BatchNorm2d(6).train(training)
    x = torch.randn(shape, requires_grad=True)
    out = fused(x, torch.zeros(shape))
    assert out.shape == shape and eager(x).shape == shape
    out.sum().backward()
    assert torch.equal(fused.weight.grad, torch.zeros(6)) and x.grad.shape == shape
    torch.testing.assert_close(fused.state_dict(), eager.state_dict())


def outcome(net: nn.Module) -> tuple[str, str]:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    try:
        return "value", f"{net(x).relu().sum().item():.2f}"
    except ValueError as error:
        return "error", str(error)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [0.0, -1.0, 1e-3])
def test_eps_is_judged_by_torch(eps: float, training: bool) -> None:
    expected = outcome(nn.BatchNorm2d(3, eps=eps).train(training))
    assert outcome(BatchNormAct2d(3, eps=eps).train(training)) == expected
    chain = nn.Sequential(nn.BatchNorm2d(3, eps=eps), nn.ReLU()).train(training)
    fuse(chain)
    assert outcome(chain) == expected


@pytest.mark.parametrize(("eps", "training"), [(0.0, True), (-1e-5, True), (-1e-5, False)])
def test_the_op_refuses_an_eps_that_is_not_positive(eps: float, training: bool) -> None:
    vectors = (None, None, torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match=f"expected a positive eps.*, got {eps}"):
        batch_norm_act(torch.randn(2, 3, 4, 4), *vectors, training=training, eps=eps)


def test_device_and_dtype_are_those_of_batch_norm() -> None:
    for kind in (BatchNormAct1d, BatchNormAct2d):
        fused, eager = (
            kind(6, device="meta", dtype=torch.float64),
            nn.BatchNorm2d(6, device="meta", dtype=torch.float64),
        )
        for ours, theirs in zip(fused.state_dict().values(), eager.state_dict().values(), strict=True):
            assert ours.is_meta and ours.dtype == theirs.dtype


def test_wrong_use_is_explained() -> None:
    with pytest.raises(ValueError, match="expected 4D input"):
        BatchNormAct2d(6)(torch.randn(3, 6))
    with pytest.raises(ValueError, match="expected activation 'relu', 'leaky_relu', 'none', got 'gelu'"):
        BatchNormAct2d(6, activation="gelu")


def test_trains_as_batch_norm_does() -> None:
    def network(fused: bool) -> nn.Sequential:
        torch.manual_seed(1)
        layers: list[nn.Module] = []
        for channels in (3, 8):
            layers.append(nn.Conv2d(channels, 8, 3, padding=1, bias=False))
            layers += [BatchNormAct2d(8)] if fused else [nn.BatchNorm2d(8), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))

    def losses(net: nn.Sequential) -> Tensor:
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(2)
        found = []
        for _ in range(50):
            x = torch.randn(16, 3, 8, 8)
            loss = F.cross_entropy(net(x), (x.mean((1, 2, 3)) > 0).long())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found)

    torch.testing.assert_close(losses(network(True)), losses(network(False)), rtol=0, atol=1e-4)

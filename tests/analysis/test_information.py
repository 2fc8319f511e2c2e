"""Mutual information estimates against closed forms and against what a layer cannot know."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import models
from auglocal_ext.analysis import Loaders, information
from auglocal_ext.analysis.information import Decoder, StrongProbe
from auglocal_ext.layers import Features

MEAN, STD = (100.0, 120.0, 140.0), (50.0, 60.0, 70.0)


def pictures(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, 3, 8, 8) of values 0..255: blocks of 2 x 2 of two colours; the class is which colours they are."""
    labels = torch.randint(3, (count,))
    palette = torch.tensor([[[250, 5, 5], [5, 250, 5]], [[5, 250, 5], [5, 5, 250]], [[5, 5, 250], [250, 5, 5]]])
    pattern = torch.randint(0, 2, (count, 4, 4)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    colours = palette[labels]  # (N, 2, 3)
    return colours.gather(1, pattern.flatten(1)[..., None].expand(-1, -1, 3)).transpose(1, 2).reshape(
        -1, 3, 8, 8
    ), labels


def source(count: int = 512, size: int = 64) -> Loaders:
    images, labels = pictures(count)
    mean, std = (torch.tensor(value).view(-1, 1, 1) for value in (MEAN, STD))
    x = (images - mean) / std
    batches = list(zip(x.split(size), labels.split(size), strict=True))
    return Loaders(batches[: len(batches) // 2], batches[len(batches) // 2 :])


def network(kind: str) -> nn.Sequential:
    """A layer that hands on the image, one that keeps a single grey value per image, one that keeps nothing."""
    first = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False))
    with torch.no_grad():
        first[0].weight.copy_(torch.eye(3).view(3, 3, 1, 1))
        if kind == "narrow":
            first[0].weight.fill_(1 / 3)
            first.append(nn.AdaptiveAvgPool2d(1)).append(nn.Upsample(size=(8, 8)))
        elif kind == "nothing":
            first[0].weight.zero_()
    return nn.Sequential(first, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 3)))


def estimate(kind: str, **options):
    torch.manual_seed(0)
    return information(network(kind), source(), 3, (3, 8, 8), MEAN, STD, **{"epochs": 16, "probe_blocks": 1, **options})


@functools.cache
def estimated(kind: str):
    return estimate(kind)


@pytest.mark.slow
def test_an_identity_tells_more_than_a_narrowed_layer_and_that_more_than_none():
    estimates = {kind: estimated(kind) for kind in ("identity", "narrow", "nothing")}
    whole, narrow, nothing = (estimates[kind].layers[0] for kind in ("identity", "narrow", "nothing"))
    most = estimates["identity"].blank_error - estimates["identity"].perfect_error
    assert whole.image_information > 0.8 * most
    assert narrow.image_information < 0.5 * whole.image_information
    assert abs(nothing.image_information) < 0.1 * most
    entropy = estimates["identity"].label_entropy
    assert whole.accuracy > 0.97 and whole.label_information > 0.9 * entropy
    assert nothing.label_information < 0.05 * entropy and nothing.accuracy < 0.5
    for found in estimates.values():
        assert found.layers[0].name == "0" and found.layers[1].name == "1"
        for layer in found.layers:
            assert layer.label_information <= entropy + 1e-9
            assert layer.image_information == pytest.approx(found.blank_error - layer.reconstruction_error)
            assert layer.reconstruction_error >= found.perfect_error


def test_the_scale_by_direct_computation():
    torch.manual_seed(0)
    network("identity")  # draws what estimate() has drawn before its data
    data = source()
    mean, std = (torch.tensor(value).view(-1, 1, 1).double() for value in (MEAN, STD))
    train, test = (torch.cat([x for x, _ in part]).double() for part in (data.train_loader, data.test_loader))
    train, test = ((x * std + mean).div(255).clamp(0, 1) for x in (train, test))
    found = estimated("identity")
    guess = train.mean(0).expand_as(test)
    assert found.blank_error == pytest.approx(float(F.binary_cross_entropy(guess, test)), rel=1e-6)
    assert found.perfect_error == pytest.approx(float(F.binary_cross_entropy(test, test)), rel=1e-6)
    shares = torch.cat([y for _, y in data.test_loader]).bincount() / len(test)
    assert found.label_entropy == pytest.approx(-sum(float(p) * math.log(p) for p in shares), rel=1e-6)


def test_repeats_and_leaves_the_network_alone():
    net = models.resnet8(num_classes=3, width=4).train()
    before = copy.deepcopy(net.state_dict())
    data = Loaders(
        [(torch.randn(8, 3, 16, 16), torch.randint(3, (8,)))], [(torch.randn(8, 3, 16, 16), torch.randint(3, (8,)))]
    )
    state = torch.get_rng_state()
    first = information(net, data, 3, (3, 16, 16), MEAN, STD, epochs=1, probe_blocks=1)
    assert torch.equal(torch.get_rng_state(), state) and net.training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert information(net, data, 3, (3, 16, 16), MEAN, STD, epochs=1, probe_blocks=1) == first
    assert information(net, data, 3, (3, 16, 16), MEAN, STD, epochs=1, probe_blocks=1, seed=1) != first
    assert [layer.name for layer in first.layers] == ["stem", "layer1_0", "layer2_0", "layer3_0", "classifier"]


def test_the_probe_of_an_image_is_a_resnet_32():
    count = sum(p.numel() for p in StrongProbe(Features((3, 32, 32)), 10, 5).parameters())
    assert count == sum(p.numel() for p in models.resnet32().parameters()) == 466_906


@pytest.mark.parametrize("shape", [(16, 32, 32), (32, 16, 16), (64, 8, 8), (64, 5, 7), (128, 1, 1), (512, 7, 7), (10,)])
def test_readouts_fit_whatever_a_layer_puts_out(shape):
    h, images, labels = torch.randn(2, *shape), torch.randn(2, 3, 32, 32), torch.tensor([0, 9])
    decoder = Decoder(Features(shape), (3, 32, 32), torch.tensor(MEAN) / 255, torch.tensor(STD) / 255)
    probe = StrongProbe(Features(shape), 10, 1)
    for readout in (decoder, probe):
        loss, _ = readout.outcome(h, images, labels)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in readout.parameters())


def test_errors():
    net = models.resnet8(num_classes=3, width=4)
    with pytest.raises(ValueError, match=r"expected images, input_shape \(channels, height, width\), got \(7,\)"):
        information(net, source(), 3, (7,), MEAN, STD)
    with pytest.raises(ValueError, match="probe_blocks must be at least 1, got 0"):
        information(net, source(), 3, (3, 8, 8), MEAN, STD, probe_blocks=0)


@pytest.mark.gpu
def test_on_a_gpu():
    on_cpu, options = estimate("identity", epochs=4), {"epochs": 4, "probe_blocks": 1}
    torch.manual_seed(0)
    net = network("identity").cuda()
    found = information(net, source(), 3, (3, 8, 8), MEAN, STD, **options)
    assert found.label_entropy == pytest.approx(on_cpu.label_entropy)
    assert found.blank_error == pytest.approx(on_cpu.blank_error, rel=1e-6)
    # The same readouts from the same weights: rounding alone differs, and training lets it grow.
    for here, there in zip(on_cpu.layers, found.layers, strict=True):
        assert there.image_information == pytest.approx(here.image_information, abs=0.1)

"""ContSup against the published counts."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import nn

from auglocal_ext import ContSup, LocalSequential, models
from auglocal_ext.cost import count_macs


@lru_cache(maxsize=None)  # several tests count in one network
def wrap(name, context, modules, head="1c2f"):
    with torch.device("meta"):
        return LocalSequential(models.build(name), ContSup(context, head), 10, (3, 32, 32), modules=modules)


@lru_cache(maxsize=None)
def backbone_macs(name):
    with torch.device("meta"):
        return count_macs(models.build(name), (3, 32, 32))


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "k", "e", "r1", "heads"),
    [
        ("resnet32", 2, 3912, 192, 28_170),
        ("resnet32", 4, 13_512, 2944, 84_958),
        ("resnet32", 8, 29_160, 8960, 180_102),
        ("resnet32", 16, 62_232, 21_808, 388_374),
        pytest.param("resnet110", 2, 3912, 192, 28_170, marks=pytest.mark.slow),
        pytest.param("resnet110", 4, 13_512, 2944, 84_958, marks=pytest.mark.slow),
        pytest.param("resnet110", 8, 30_936, 9776, 198_086, marks=pytest.mark.slow),
        pytest.param("resnet110", 16, 62_232, 21_808, 388_374, marks=pytest.mark.slow),
    ],
)
def test_parameter_counts(name, k, e, r1, heads):
    assert count(wrap(name, "R0", k).context) == 0
    net = wrap(name, "E", k)
    assert count(net.context) == e and count(net.auxiliary) == heads
    assert count(wrap(name, "R1", k).context) == r1
    r1e = wrap(name, "R1E", k)
    first = net.network.last_layer(0).shape[0]
    assert count(r1e.context) == e + r1 - first * (3 + 3)  # after the first module only E is built


# multiply-accumulates per image, in millions
@pytest.mark.parametrize(
    ("name", "context", "k", "millions"),
    [
        ("resnet32", "E", 2, 3.87),
        ("resnet32", "E", 4, 13.38),
        ("resnet32", "E", 8, 28.86),
        ("resnet32", "E", 16, 61.60),
        ("resnet32", "R1", 2, 0.10),
        ("resnet32", "R1", 4, 1.10),
        ("resnet32", "R1", 8, 2.15),
        ("resnet32", "R1", 16, 4.24),
        ("resnet32", "R2", 16, 8.75),
        pytest.param("resnet110", "E", 8, 30.63, marks=pytest.mark.slow),
        pytest.param("resnet32", "R4", 16, 18.6, marks=pytest.mark.slow),
        pytest.param("resnet32", "R8", 16, 39.6, marks=pytest.mark.slow),
        pytest.param("resnet32", "R16", 16, 61.1, marks=pytest.mark.slow),
    ],
)
def test_arithmetic_of_the_context(name, context, k, millions):
    net, backbone = wrap(name, context, k), backbone_macs(name)
    with torch.device("meta"):
        with_context = count_macs(net.export(), (3, 32, 32))
    assert backbone / 1e6 == pytest.approx(69.12 if name == "resnet32" else 253.15, abs=0.006)
    assert (with_context - backbone) / 1e6 == pytest.approx(millions, rel=0.006, abs=0.005)


def test_networks_on_vectors():
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match="needs images|needs images and feature maps"):
        LocalSequential(layers, ContSup("E", "0c1f"), 3, (6,))
    with pytest.raises(ValueError, match="needs feature maps with height and width"):
        LocalSequential(layers, ContSup("R0", "1c2f"), 3, (6,))
    net = LocalSequential(layers, ContSup("R0", "0c2f"), 3, (6,))
    net(torch.randn(4, 6), torch.tensor([0, 1, 2, 0])).loss.backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": "R-1"}, "unknown context structure 'R-1'"),
        ({"head": "9c9f"}, "unknown auxiliary head '9c9f'"),
        ({"widen": 0}, "is a number above 0; got 0"),
        ({"feature_dim": 0}, r"feature_dim \(features .*\) is a whole number of at least 1; got 0"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        ContSup(**options)

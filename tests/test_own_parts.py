"""Layers and terms that the rules were not written for: kept as they are, or refused with the way out."""

from __future__ import annotations

import copy

import pytest
import torch
from test_nothing_silent import batch, network
from torch import nn

from auglocal_ext import (
    AugLocal,
    LocalSequential,
)
from auglocal_ext.auxiliary import LossContext, Term
from auglocal_ext.rules import LinearHead, Rule


def test_a_network_too_shallow():
    layers = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
    with pytest.raises(ValueError, match="the network has one layer, which leaves none to be trained locally$"):
        LocalSequential(layers, AugLocal(2), 10, (3, 2, 2))


def test_a_layer_of_several_convolutions():
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )
    net = LocalSequential(layers, AugLocal(2, joint_tail=False), 10, (3, 16, 16))
    assert net.network.layers[1].what == "a run of 2 layers with weights (Conv2d, Conv2d)"
    assert repr(net.auxiliary[0].blocks[0]) == repr(layers[1])


class Squash(nn.Module):
    def forward(self, x):
        return x.tanh()


@pytest.mark.parametrize("odd", [Squash, lambda: nn.LayerNorm([8, 16, 16])])
def test_what_an_auxiliary_convolution_does_not_have_is_not_left_out(odd):
    layers = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), odd()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )
    net = LocalSequential(layers, AugLocal(2, joint_tail=False), 10, (3, 16, 16))
    assert [repr(part) for part in net.auxiliary[0].blocks[0]] == [repr(part) for part in layers[1:3]]


@pytest.mark.parametrize(
    ("parts", "kinds"),
    [
        ([nn.GroupNorm(2, 8), nn.SiLU()], ["Conv2d", "GroupNorm", "SiLU"]),
        ([nn.InstanceNorm2d(8, affine=True), nn.ReLU()], ["Conv2d", "InstanceNorm2d", "ReLU"]),
        ([nn.BatchNorm2d(8), nn.PReLU(8)], ["Conv2d", "BatchNorm2d", "PReLU"]),
        ([nn.LocalResponseNorm(3), nn.Dropout(), nn.ELU(), nn.MaxPool2d(1)], ["Conv2d", "LocalResponseNorm", "ELU"]),
        ([], ["Conv2d", "ReLU"]),
    ],
)
def test_auxiliary_convolutions_have_the_layers_norm_and_activation(parts, kinds):
    layers = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), *parts),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    )
    net = LocalSequential(layers, AugLocal(2, joint_tail=False), 10, (3, 16, 16), fused=False)
    assert [type(m).__name__ for m in net.auxiliary[0].blocks[0]] == kinds
    net(*batch()).loss.backward()


class Small(Term):
    def loss(self, h, context):
        return h.square().mean()


def test_a_term_of_ones_own_is_not_recomputed_without_a_word():
    class Decayed(Rule):
        def build_auxiliary(self, network, module):
            from auglocal_ext.auxiliary import Objectives

            head = LinearHead().build_auxiliary(network, module)
            return Objectives(head, 1.0, [(0.5, Small(network.settings(module)))])

    net = network(Decayed())
    h = torch.randn(4, 4, 16, 16)
    both, head = (
        part.loss(h, LossContext(torch.tensor([0, 1, 2, 3]))).loss
        for part in (net.auxiliary[0], net.auxiliary[0].network)
    )
    torch.testing.assert_close(both, head + 0.5 * h.square().mean())
    with pytest.raises(ValueError, match="Small cannot recompute"):
        network(Decayed(), recompute="auxiliary")
    assert copy.deepcopy(net)(*batch()).loss.isfinite()

"""What is said where a network does not fit."""

from __future__ import annotations

import pytest
import torch
from test_describe import described
from torch import nn

from auglocal_ext import AugLocal, Greedy, LocalSequential
from auglocal_ext.layers import group_children


def test_a_missing_flatten_is_found():
    parts = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Linear(32, 4)]
    with pytest.raises(
        ValueError, match=r"layers\[3\] \(Linear\).*\(N, 8, 2, 2\).*missing nn.Flatten\(\) before layers\[3\]"
    ):
        described(nn.Sequential(*parts), (3, 8, 8))
    parts[3] = nn.Sequential(nn.Dropout(), nn.Linear(32, 4))
    with pytest.raises(ValueError, match="missing nn.Flatten"):
        described(nn.Sequential(*parts), (3, 8, 8))


def test_naive_children_of_a_model():
    torchvision = pytest.importorskip("torchvision", exc_type=Exception)
    with torch.device("meta"):
        resnet = torchvision.models.resnet18(weights=None, num_classes=6)
        with pytest.raises(ValueError, match="missing nn.Flatten"):
            described(nn.Sequential(*resnet.children()), (3, 64, 64))
        vgg = torchvision.models.vgg11(weights=None, num_classes=6)
        children = nn.Sequential(vgg.features, vgg.avgpool, nn.Flatten(), vgg.classifier)
        for rule, modules in ((AugLocal(depth=2), None), (Greedy(), 4)):
            with pytest.raises(
                ValueError, match=r"layers\[0\] \(Sequential of 21\) holds most of the network .*unnest it"
            ):
                LocalSequential(children, rule, 6, (3, 64, 64), modules)


def test_what_a_module_returns():
    class Two(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    class Transposed(nn.Linear):
        def forward(self, x):
            return super().forward(x).t()

    with pytest.raises(ValueError, match="returns tuple; each layer must map one tensor to one tensor"):
        described(nn.Sequential(Two(4, 4), nn.Linear(4, 2)), (4,))
    with pytest.raises(ValueError, match="each layer must keep the batch as the first axis"):
        described(nn.Sequential(Transposed(4, 4), nn.Linear(1, 2)), (4,))


def test_an_input_shape_with_the_channels_last_is_told_from_one_with_a_batch():
    layers = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match=r"the channels come first: input_shape=\(3, 8, 9\)"):
        described(layers, (8, 9, 3))
    with pytest.raises(ValueError, match="the shape of one input without the batch dimension"):
        described(layers, (1, 3, 8, 9))


def test_what_is_no_sequential_is_told_how_to_become_one():
    linear = nn.Linear(3, 3)
    for children in ([linear], (linear,), nn.ModuleList([linear])):
        with pytest.raises(TypeError, match=rf"got {type(children).__name__}; nn.Sequential\(\*layers\) makes one$"):
            group_children(children)
    with pytest.raises(TypeError, match=r"got Linear; write its stages as nn.Sequential\(stem, .* must be a child too"):
        group_children(linear)

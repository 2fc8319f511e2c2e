"""The body of a layer: what of it a rule copies, and what counts as the tail that ends its map."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from auglocal_ext import MAN, LocalSequential
from auglocal_ext.layers import evaluating, observe
from auglocal_ext.rules.body import without_tail


def convolution():
    return [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()]


POOLED = (nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    ("parts", "inside", "last"),
    [
        (convolution(), 3, 3),
        ([*convolution(), *POOLED], 3, 3),
        ([*convolution(), nn.Dropout(), *POOLED], 4, 4),
        ([*convolution(), nn.MaxPool2d(2)], 4, 3),  # a smaller map is still one
        ([nn.Conv2d(3, 8, 3), nn.Upsample(scale_factor=2)], 2, 1),
        ([nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten()], 1, 1),
        ([nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(), *POOLED], 3, 3),
        ([nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(8)], 4, 4),
        ([nn.ReLU(), *POOLED], 1, 1),
        (POOLED, 0, 0),
        ([nn.Flatten(), nn.Linear(192, 8), nn.Unflatten(1, (8, 1))], 3, 2),
    ],
)
def test_a_tail_begins_where_the_map_ends(parts, inside, last):
    with evaluating(*parts):
        handed = observe(parts, torch.zeros(1, 3, 8, 8))
    assert [without_tail(parts, handed, at_end) for at_end in (False, True)] == [inside, last]


def test_man_copies_the_last_layer_without_its_tail():
    layers = [nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 12, 1), nn.ReLU(), nn.MaxPool2d(2)]
    for end in ([nn.Flatten(), nn.Linear(48, 4)], [nn.Sequential(nn.Flatten(), nn.Linear(48, 4))]):
        copied = LocalSequential(nn.Sequential(*layers, *end), MAN(), 4, (3, 8, 8)).auxiliary[1].trained
        assert [type(part).__name__ for part in copied] == ["Conv2d", "ReLU"]
        assert copied(torch.zeros(1, 8, 4, 4)).shape == (1, 12, 4, 4)


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))

    def forward(self, x):
        return torch.einsum("nchw,cd->ndhw", x, self.weight)


def test_a_body_has_the_axes_that_the_layer_after_it_tells():
    layers = [nn.Conv2d(3, 8, 1), Mixed(), nn.Conv2d(8, 8, 1), *POOLED, nn.Linear(8, 4)]
    net = LocalSequential(nn.Sequential(*layers), MAN(head="linear"), 4, (3, 8, 8), [0])
    assert isinstance(net.auxiliary[0].trained[0], Mixed)

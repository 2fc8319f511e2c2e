"""Axes where sizes coincide, where no layer tells, and of the input: found, or refused, and never guessed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from layouts import Block, Permute, classifier, found
from torch import nn

from auglocal_ext import AugLocal, ContSup, Greedy, InfoPro, LocalSequential
from auglocal_ext.layers import Features


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


class Rolled(nn.Module):
    """Moves what it receives before its linear layer, as shifted windows do: no layer takes just its input."""

    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x):
        return x + self.linear(x.roll(1, 1))


class Turned(nn.Module):
    """A layer over one axis in a network over another."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("size", [6, 8])
def test_a_permutation_that_keeps_the_sizes_is_not_taken_for_an_activation(size):
    """With C = 8 found or refused, and at H = W = 8 never found wrong."""
    maps = nn.Sequential(
        *(nn.Conv2d(3, 8, 2, 2), Permute(0, 2, 3, 1), Rolled(8), Rolled(8), Permute(0, 3, 1, 2), classifier(8))
    )
    inside = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 2, 2), Permute(0, 2, 3, 1)), *(Rolled(8), Permute(0, 3, 1, 2), classifier(8))
    )
    for net in (maps, inside):
        assert found(net, (3, 2 * size, 2 * size))[0] is None
        with pytest.raises(ValueError, match="no layer around it tells which axis holds the channels"):
            LocalSequential(net, Greedy(), 3, (3, 2 * size, 2 * size))
        assert LocalSequential(
            net, Greedy(), 3, (3, 2 * size, 2 * size), layout=["channels_last", *[None] * (len(net) // 3)]
        )
    sound = nn.Sequential(
        nn.Sequential(nn.Conv1d(2, 8, 1), Permute(0, 2, 1)),
        *(Rolled(8), Permute(0, 2, 1), nn.Flatten(), nn.Linear(8 * size, 3)),
    )
    assert found(sound, (2, size))[0] is None
    turned = nn.Sequential(Turned(nn.Linear(size, 8)), Turned(nn.Linear(8, 8)), nn.Flatten(), nn.Linear(64, 3))
    assert found(turned, (size, 8))[0] is None


class Padding(nn.Module):
    """A stem of one's own that does something before its first layer."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return self.conv(F.pad(x, (1, 1, 1, 1)))


class Normalize(nn.Module):
    def forward(self, x):
        return (x - 0.5) / 0.25


@pytest.mark.parametrize(
    "stem",
    [
        lambda: [Normalize(), nn.Conv2d(3, 8, 3, padding=1)],
        lambda: [nn.Identity(), nn.Conv2d(3, 8, 3, padding=1)],
        lambda: [nn.ZeroPad2d(1), nn.Conv2d(3, 8, 3)],
        lambda: [Padding()],
    ],
)
def test_the_inputs_channels_are_found_behind_what_comes_before_the_first_layer(stem):
    net = nn.Sequential(*stem(), nn.Conv2d(8, 8, 3), classifier(8))
    for rule in (ContSup("R1E", head="0c1f"), InfoPro((1.0, 1.0), (1.0, 1.0), head="linear")):
        net_ = LocalSequential(net, rule, 3, (3, 8, 8))
        assert net_.network.input == Features((3, 8, 8))
        net_(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])).loss.backward()


def test_the_inputs_layout_is_said_with_that_of_the_layers():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8))

        def forward(self, x):
            return torch.einsum("nchw,cd->ndhw", x, self.weight)

    net = nn.Sequential(Mixed(), nn.Conv2d(8, 8, 3), classifier(8))
    with pytest.raises(ValueError, match="no layer tells which axis holds the channels: say .*layout='channels_first'"):
        LocalSequential(net, InfoPro((1.0, 1.0), (1.0, 1.0), head="linear"), 3, (3, 8, 8))
    wrapped = LocalSequential(
        net, InfoPro((1.0, 1.0), (1.0, 1.0), head="linear"), 3, (3, 8, 8), layout="channels_first"
    )
    assert wrapped.network.input == Features((3, 8, 8))


def test_widths_are_not_guessed_where_no_layer_tells_the_axes():
    """Tokens made by a plain product: T must not become a width."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))

        def forward(self, x):
            return x @ self.weight

    net = nn.Sequential(nn.Linear(3, 8), Product(), Product(), nn.Flatten(), nn.Linear(40, 3))
    asked = []

    def factory(fan_in, fan_out, stride, layer):
        asked.append((fan_in, fan_out))
        return nn.Linear(fan_in, fan_out)

    rule = AugLocal(2, joint_tail=False, block=factory)
    with pytest.raises(ValueError, match="the width of layer 2 .Product. is not known, since no layer around it tells"):
        LocalSequential(net, rule, 3, (5, 3), modules=[0])
    LocalSequential(net, rule, 3, (5, 3), modules=[0], layout="channels_last")
    assert asked == [(8, 8)]


def test_integer_tokens_of_another_length_in_inference():
    net = nn.Sequential(nn.Embedding(11, 8), Block(8), Mean(), nn.Linear(8, 3))
    net = LocalSequential(net, Greedy(), 3, example_input=torch.zeros(1, 7, dtype=torch.int64))
    assert net(torch.zeros(2, 9, dtype=torch.int64)).shape == (2, 3)
    with pytest.raises(
        ValueError, match="looks up integer tokens. Say example_input=torch.zeros.1, 7, dtype=torch.int64"
    ):
        LocalSequential(net.primary, Greedy(), 3, (7,))
    with pytest.raises(TypeError, match="example_input must be floating point, or integers.*complex64"):
        LocalSequential(net.primary, Greedy(), 3, example_input=torch.zeros(1, 7, dtype=torch.complex64))


class Rectified(nn.Module):
    """A convolution whose own output is not what it hands on: it tells the axes of something like it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return F.relu(self.conv(x))


class Tokens(nn.Module):
    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


def test_what_is_said_must_not_contradict_what_a_layer_has_made_on_the_way():
    net = nn.Sequential(Rectified(), nn.Sequential(Tokens(), nn.Linear(8, 8)), Mean(), nn.Linear(8, 3))
    assert found(net, (3, 8, 8))[0] == Features((8, 6, 6))
    with pytest.raises(ValueError, match="layer 0: layout='channels_last'.*takes axis 1"):
        LocalSequential(net, Greedy(), 3, (3, 8, 8), layout=["channels_last", None])

"""Layers and networks of every layout, for tests of the axes that are found."""

from __future__ import annotations

import torch
from torch import nn

from auglocal_ext.layers import describe, probe_input


def found(net, shape, layout=None):
    """The features of every layer; None where nothing tells the axes."""
    return [layer.features for layer in describe(net, probe_input(net, shape), layout).layers]


class Block(nn.Module):
    """A transformer's: attention and a perceptron over the last axis."""

    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Patches(nn.Module):
    """A convolution whose map becomes tokens, with a class token in front."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 4, 4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 5, width))

    def forward(self, x):
        x = self.conv(x).flatten(2).transpose(1, 2)
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position


class First(nn.Module):
    def forward(self, x):
        return x[:, 0]


class Permute(nn.Module):
    def __init__(self, *axes):
        super().__init__()
        self.axes = axes

    def forward(self, x):
        return x.permute(self.axes)


class ConvNeXt(nn.Module):
    """Channels first outside, last inside."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.down(self.up(self.norm(self.conv(x).permute(0, 2, 3, 1))).relu())
        return x + h.permute(0, 3, 1, 2)


class ChannelsLast(nn.Module):
    """As a Swin block: maps with the channels last throughout."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


def classifier(width, pool=True):
    return nn.Sequential(*([nn.AdaptiveAvgPool2d(1)] if pool else []), nn.Flatten(), nn.Linear(width, 3))


def vit(width=8):
    return nn.Sequential(Patches(width), Block(width), Block(width), nn.LayerNorm(width), First(), nn.Linear(width, 3))


def swin(width=8, size=4):
    tail = (nn.LayerNorm(width), Permute(0, 3, 1, 2), classifier(width))
    stem = (nn.Conv2d(3, width, 8 // size, 8 // size), Permute(0, 2, 3, 1), nn.LayerNorm(width))
    return nn.Sequential(*stem, ChannelsLast(width), ChannelsLast(width), *tail)

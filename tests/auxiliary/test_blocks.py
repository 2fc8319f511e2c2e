"""Fresh blocks are of the kind of the layer they are modelled on, down to its settings, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import AugLocal, LocalSequential
from auglocal_ext.auxiliary import make_block


class Block(nn.Module):
    def __init__(self, norm, dropout=0.0):
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2, self.dropout = norm(8), norm(8), dropout

    def forward(self, x):
        out = F.relu(self.norm1(self.conv1(x)))
        if self.dropout is not None:
            out = F.dropout(out, self.dropout, self.training)
        return F.relu(self.norm2(self.conv2(out)) + x)


def wrapped(*layers):
    tail = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *layers, tail)
    return LocalSequential(net, AugLocal(2, joint_tail=False), 4, (3, 8, 8), fused=False)


def test_norms_of_residual_blocks_have_the_settings_of_the_layers():
    net = wrapped(Block(lambda width: nn.BatchNorm2d(width, eps=0.1, momentum=0.02)))
    norms = [m for m in net.auxiliary[0].blocks[0].modules() if isinstance(m, nn.BatchNorm2d)]
    assert [(norm.eps, norm.momentum) for norm in norms] == [(0.1, 0.02)] * 2


@pytest.mark.parametrize(
    "block",
    [
        lambda: Block(lambda width: nn.BatchNorm2d(width, affine=False)),
        lambda: Block(lambda width: nn.BatchNorm2d(width, track_running_stats=False)),
        lambda: Block(nn.BatchNorm2d, dropout=0.5),
    ],
    ids=["no weights", "no statistics", "functional dropout"],
)
def test_residual_blocks_with_other_parts_are_of_no_known_form(block):
    copied = wrapped(block()).auxiliary[0].blocks[0]
    assert repr(copied) == repr(block()) and copied.dropout == block().dropout
    assert wrapped(Block(nn.BatchNorm2d, dropout=None)).network.layers[1].kind == "basic"


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(8, 0.1, 0.02, affine=False, track_running_stats=False),
        nn.GroupNorm(2, 8, 0.1, affine=False),
    ],
    ids=repr,
)
def test_norms_of_convolutions_have_the_settings_of_the_layers(norm):
    net = wrapped(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), norm)
    conv, made, _ = net.auxiliary[0].blocks[0]
    assert conv.padding_mode == "reflect" and repr(made) == repr(norm)


@pytest.mark.parametrize(
    "conv",
    [nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 2)],
    ids=["in groups", "of an even kernel"],
)
def test_a_convolution_of_no_known_form_is_copied(conv):
    (copied,) = wrapped(conv).auxiliary[0].blocks
    assert repr(copied) == repr(conv)


def test_a_layer_of_no_known_form_has_no_block_of_its_kind():
    net = wrapped(nn.Conv2d(8, 8, 3, padding=1, groups=8)).network
    with pytest.raises(ValueError, match="layer 1 is a convolution in 8 groups, so that no auxiliary block.*factory"):
        make_block(net.layers[1], net.children_of(net.layers[1]), 8, 1)


@pytest.mark.parametrize(
    "norm", [nn.LayerNorm(8, 0.1, bias=False), nn.RMSNorm(8, 0.1, elementwise_affine=False)], ids=repr
)
def test_norms_of_tokens_have_the_settings_of_the_layers(norm):
    class First(nn.Module):
        def forward(self, x):
            return x[:, 0]

    layers = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), norm, nn.GELU(), First(), nn.Linear(8, 4))
    net = LocalSequential(layers, AugLocal(2, joint_tail=False), 4, (5, 3))
    _, made, _ = net.auxiliary[0].blocks[0]
    assert repr(made) == repr(norm) and (getattr(made, "bias", None) is None) == (getattr(norm, "bias", None) is None)
    net(torch.randn(4, 5, 3), torch.tensor([0, 1, 2, 3])).loss.backward()

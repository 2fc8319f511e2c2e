"""Fresh blocks are of the kind of the layer they are modelled on, down to its settings, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext import AugLocal, Greedy, LocalSequential
from auglocal_ext.auxiliary import make_block
from auglocal_ext.models.blocks import Bottleneck


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


MAP_NORMS = {
    nn.BatchNorm2d(8, 0.1, 0.02): nn.BatchNorm2d(16, 0.1, 0.02),
    nn.GroupNorm(2, 8, 0.1): nn.GroupNorm(2, 16, 0.1),
    nn.InstanceNorm2d(8, 0.1, 0.02, affine=True, track_running_stats=True): nn.InstanceNorm2d(
        16, 0.1, 0.02, True, True
    ),
    nn.LocalResponseNorm(3): nn.LocalResponseNorm(3),
}
VECTOR_NORMS = {
    nn.BatchNorm1d(8, 0.1, 0.02): nn.BatchNorm1d(16, 0.1, 0.02),
    nn.LayerNorm(8, 0.1): nn.LayerNorm(16, 0.1),
    nn.RMSNorm(8, 0.1): nn.RMSNorm(16, 0.1),
}


def of_width_16(*layers):
    """The fresh block of another width that is modelled on the second layer, which ``layers`` are."""
    first = nn.Conv2d(3, 8, 1) if isinstance(layers[0], nn.Conv2d) else nn.Linear(3, 8)
    tail = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if isinstance(first, nn.Conv2d) else []
    shape = (3, 8, 8) if tail else (3,)
    network = nn.Sequential(first, *layers, *tail, nn.Linear(8, 4), nn.Softplus())
    net = LocalSequential(network, Greedy(), 4, shape, fused=False)  # as a rule sees it
    layer = net.network.layers[1]
    block = make_block(layer, net.network.children_of(layer), 8, 1, width=16)
    x = torch.randn(2, 8, *shape[1:])
    assert block(x).shape == (2, 16, *shape[1:])
    return block


@pytest.mark.parametrize("norm", [*MAP_NORMS, *VECTOR_NORMS], ids=repr)
def test_norms_have_the_width_of_the_block(norm):
    main = nn.Conv2d(8, 8, 1) if norm in MAP_NORMS else nn.Linear(8, 8)
    for activation in ([nn.ELU()], []):  # what stands behind the classifier is none of the layer's
        _, made, last = of_width_16(main, norm, nn.Dropout(), *activation)
        assert repr(made) == repr((MAP_NORMS | VECTOR_NORMS)[norm])
        assert repr(last) == repr([*activation, nn.ReLU(inplace=True)][0])


@pytest.mark.parametrize("shared", [True, False])
def test_learned_slopes_are_as_many_as_the_layer_has_them(shared):
    _, made = of_width_16(nn.Linear(8, 8, bias=False), nn.PReLU(1 if shared else 8, 0.1))
    assert repr(made) == repr(nn.PReLU(1 if shared else 16)) and bool((made.weight == 0.1).all())


@pytest.mark.parametrize("bias", [True, False])
def test_blocks_keep_the_size_of_maps_and_whether_there_are_biases(bias):
    conv, _ = of_width_16(nn.Conv2d(8, 8, (5, 7), padding=(2, 9), dilation=(1, 3), bias=bias))
    assert (conv.kernel_size, conv.dilation, conv.padding) == ((5, 7), (1, 3), (2, 9))
    linear, _ = of_width_16(nn.Linear(8, 8, bias=bias))
    assert (conv.bias is not None) == (linear.bias is not None) == bias


class Plus(nn.Module):
    """A part of no known kind."""

    def forward(self, h):
        return h + 1


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([nn.Conv2d(8, 8, 3, padding=1), Plus()], "holds a Plus"),
        ([nn.Conv2d(8, 8, 3, padding=1), nn.LayerNorm([8, 8])], "holds a LayerNorm"),
        ([nn.Conv2d(8, 8, 3, padding=1), nn.RMSNorm([8, 8])], "holds a RMSNorm"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_parts_that_a_block_would_lack_are_refused(layers, message):
    net = wrapped(*layers, nn.ELU()).network
    with pytest.raises(ValueError, match=f"layer 1 {message}, so that no auxiliary block of its kind can be made"):
        make_block(net.layers[1], net.children_of(net.layers[1]), 8, 1)


def test_what_follows_the_activation_is_left_out_and_a_factory_gets_the_layer():
    net = wrapped(nn.Conv2d(8, 8, 3, padding=1), nn.ELU(), Plus(), nn.Conv2d(8, 8, 1)).network
    made = make_block(net.layers[1], net.children_of(net.layers[1]), 8, 1)
    assert [type(part) for part in made] == [nn.Conv2d, nn.ELU] and not made[0].bias.any()
    children = net.children_of(net.layers[0])
    factory = lambda fan_in, fan_out, stride, layer: nn.ModuleList([layer])  # noqa: E731
    assert make_block(net.layers[0], children, 3, 1, factory)[0] is children[0]


def test_bottlenecks_of_another_width_keep_their_proportions_and_groups():
    net = wrapped(Bottleneck(8, 8, 1, 4, groups=2)).network
    assert (net.layers[1].kind, net.layers[1].width) == ("bottleneck", 2)
    made = make_block(net.layers[1], net.children_of(net.layers[1]), 8, 2, width=6)
    assert [conv.out_channels for conv in (made.conv1, made.conv2, made.conv3)] == [12, 12, 24]
    assert made.conv2.groups == 2 and made(torch.randn(2, 8, 6, 6)).shape == (2, 24, 3, 3)

"""From children to layers: which belong together, kinds, shapes and widths, and what is said where they do not fit."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from auglocal_ext import AugLocal, Greedy, LocalSequential, models
from auglocal_ext.layers import describe, group_children, probe_input


def described(net, shape, layout=None):
    return describe(net, probe_input(net, shape), layout).layers


def test_parameter_free_children_join_the_layer_before():
    net = nn.Sequential(
        nn.Identity(),
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Dropout(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    assert group_children(net) == [(0, 5), (5, 11)]
    layers = described(net, (3, 16, 16))
    assert [(layer.kind, layer.width, layer.shape) for layer in layers] == [
        ("conv", 8, (8, 7, 7)),
        ("conv", 8, (4,)),
    ]


def test_multilayer_perceptron_and_single_layer():
    net = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    assert [layer.kind for layer in described(net, (5,))] == ["linear", "linear"]
    assert group_children(nn.Sequential(nn.Flatten(), nn.Linear(8, 3))) == [(0, 2)]


def test_a_convolution_can_be_the_classifier():
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU()),
        *(nn.Conv2d(12, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )
    assert [(layer.kind, layer.width) for layer in described(net, (3, 9, 9))] == [("conv", 8), ("conv", 12)]


def test_a_layer_of_two_convolutions_is_of_no_known_kind():
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)), nn.Flatten(), nn.LazyLinear(4))
    net(torch.zeros(1, 3, 9, 9))
    (layer,) = described(net, (3, 9, 9))
    assert layer.kind == "other" and layer.what == "a run of 2 layers with weights (Conv2d, Conv2d)"


def test_torchvision_children_are_understood():
    torchvision = pytest.importorskip("torchvision", exc_type=Exception)
    r = torchvision.models.resnet18(weights=None, num_classes=6)
    blocks = itertools.chain(r.layer1, r.layer2, r.layer3, r.layer4)
    net = nn.Sequential(r.conv1, r.bn1, r.relu, r.maxpool, *blocks, r.avgpool, nn.Flatten(), r.fc)
    layers = described(net, (3, 64, 64))
    assert [layer.kind for layer in layers] == ["conv"] + ["basic"] * 8
    assert (layers[-1].start, layers[-1].stop) == (11, 15)


def test_describing_changes_nothing():
    net = models.resnet_cifar(8, width=4).train()
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    modes = [m.training for m in net.modules()]
    state = torch.get_rng_state()
    described(net, (3, 32, 32))
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_layers_must_be_a_sequential():
    with pytest.raises(TypeError, match="nn.Sequential.*got Linear"):
        group_children(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no child with parameters"):
        group_children(nn.Sequential(nn.ReLU()))


class RootMeanSquare(nn.Module):
    """A normalisation of one's own, for channels-first maps."""

    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x):
        return x * self.scale * x.square().mean((1, 2, 3), keepdim=True).rsqrt()


class NormAct(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm, self.act = nn.BatchNorm2d(channels), nn.PReLU(channels)

    def forward(self, x):
        return self.act(self.norm(x))


@pytest.mark.parametrize(
    "joined",
    [
        lambda: nn.PReLU(),
        lambda: nn.PReLU(8),
        lambda: nn.RMSNorm([8, 14, 14]),
        lambda: nn.LayerNorm([8, 14, 14]),
        lambda: nn.LocalResponseNorm(3),
        lambda: RootMeanSquare(8),
        lambda: NormAct(8),
        lambda: nn.Sequential(nn.BatchNorm2d(8), nn.ReLU()),
    ],
)
def test_normalisations_and_activations_with_parameters_join_the_layer_before(joined):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), joined(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    assert group_children(net) == [(0, 2), (2, 6)]
    assert [(layer.kind, layer.width) for layer in described(net, (3, 16, 16))] == [("conv", 8), ("conv", 8)]


def test_weights_that_mix_channels_start_a_layer_however_small():
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Conv1d(1, 1, 1), nn.Embedding(4, 1), nn.Linear(1, 1))
    assert group_children(net) == [(0, 1), (1, 2), (2, 3), (3, 5)]


class Dot(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8))

    def forward(self, x):
        return (x * self.weight).sum(1, keepdim=True)


def test_what_looks_like_a_normalisation_and_is_none_is_refused():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), Dot())
    with pytest.raises(
        ValueError, match=r"layers\[4\] \(Dot\) .* turns \(8,\) into \(1,\); put it and the layer before"
    ):
        described(net, (4,))
    whole = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Dot()))
    assert len(described(whole, (4,))) == 1


# Residual blocks, whatever their class and their parts are called


class Kuangliu(nn.Module):
    """The usual block of CIFAR repositories: functional activations, an empty shortcut."""

    def __init__(self, fan_in, width, stride=1):
        super().__init__()
        self.first = nn.Conv2d(fan_in, width, 3, stride, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Sequential()
        if stride > 1 or fan_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(fan_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        out = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        out += self.shortcut(x)
        return F.relu(out)


class Padded(Kuangliu):
    """Option A of He et al.: the shortcut drops positions and pads channels, without weights."""

    def __init__(self, fan_in, width, stride=1):
        super().__init__(fan_in, width, stride)
        self.shortcut, self.pad = nn.Identity(), width - fan_in

    def forward(self, x):
        out = self.norm2(self.second(self.norm1(self.first(x)).relu()))
        return (F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.pad)) + out).relu_()


class Nested(nn.Module):
    def __init__(self, fan_in, width):
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(fan_in, width // 4, 1, bias=False), nn.BatchNorm2d(width // 4), nn.ReLU(inplace=True)),
            *(nn.Conv2d(width // 4, width // 4, 3, padding=1, groups=2), nn.BatchNorm2d(width // 4), nn.ReLU()),
            *(nn.Conv2d(width // 4, width, 1, bias=False), nn.BatchNorm2d(width)),
        )
        self.skip = nn.Conv2d(fan_in, width, 1)

    def forward(self, x):
        return torch.relu(self.skip(x) + self.body(x))


def around(block, channels=8, size=8):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), block, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)
    )


@pytest.mark.parametrize("where", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("make", "kind", "out", "width"),
    [
        (lambda: models.BasicBlock(8, 8), "basic", 8, 8),
        (lambda: models.BasicBlock(8, 16, 2), "basic", 16, 16),
        (lambda: Kuangliu(8, 8), "basic", 8, 8),
        (lambda: Kuangliu(8, 16, 2), "basic", 16, 16),
        (lambda: Padded(8, 16, 2), "basic", 16, 16),
        (lambda: models.Bottleneck(8, 32), "bottleneck", 32, 8),
        (lambda: models.Bottleneck(8, 32, 1, 16, 2), "bottleneck", 32, 8),
        (lambda: Nested(8, 32), "bottleneck", 32, 8),
    ],
)
def test_residual_blocks_are_known_by_what_they_compute(make, kind, out, width, where):
    with torch.device(where):
        net = around(make(), out)
        last = described(net, (3, 8, 8))[-1]
    assert (last.kind, last.out_channels, last.width) == (kind, out, width)


class BasicBlock(nn.Module):
    """Of torchvision's name, and of any form."""

    def __init__(self, kernel=3, norm=nn.BatchNorm2d, act=nn.ReLU, drop=None, pre=False, dilation=1):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv1 = nn.Conv2d(8, 8, kernel, padding=padding, dilation=dilation)
        self.conv2 = nn.Conv2d(8, 8, kernel, padding=padding, dilation=dilation)
        self.bn1, self.bn2 = norm(8), norm(8)
        self.relu, self.drop, self.pre = act(), drop or nn.Identity(), pre

    def forward(self, x):
        if self.pre:
            return x + self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
        out = self.bn2(self.conv2(self.drop(self.relu(self.bn1(self.conv1(x))))))
        return self.relu(out + x)


class Bottleneck(nn.Module):
    """Of torchvision's name, without its third convolution and its expansion."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.bn1, self.bn2 = nn.BatchNorm2d(4), nn.BatchNorm2d(8)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Dropping(nn.Module):
    """As stochastic depth is: nothing at all in eval mode."""

    def forward(self, x):
        return x * 2 * (torch.rand(()) < 0.5) if self.training else x


class Ended(nn.Module):
    """A basic block whose end is said."""

    def __init__(self, end):
        super().__init__()
        self.inner, self.end = BasicBlock(), end

    def forward(self, x):
        parts = self.inner
        out = parts.bn2(parts.conv2(F.relu(parts.bn1(parts.conv1(x)))))
        return self.end(out, x)


def _first_channels_off(out, x):
    out = out + x
    out[:, :2] = 0
    return F.relu(out)


#: ``relu(chain(x) + ...)`` of something else than the input.
ENDS = {
    "a factor of the sum": lambda out, x: F.relu(torch.add(out, x, alpha=0.1)),
    "a factor of the input": lambda out, x: F.relu(out + 0.5 * x),
    "attention": lambda out, x: F.relu(out + x * torch.sigmoid(x.mean())),
    "no gradient": lambda out, x: F.relu(out + x.detach()),
    "no shortcut": lambda out, x: F.relu(out + torch.zeros_like(x)),
    "a number": lambda out, x: F.relu(out + 1),
    "written to in part": _first_channels_off,
    "the sum of both twice": lambda out, x: F.relu(out + x + x),
}


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_a_shortcut_of_another_form_makes_another_block(end):
    assert described(around(Ended(end)), (3, 8, 8))[-1].kind == "other"
    assert described(around(Ended(lambda out, x: F.relu(out + x))), (3, 8, 8))[-1].kind == "basic"


@pytest.mark.parametrize(
    "make",
    [
        lambda: BasicBlock(kernel=7),
        lambda: BasicBlock(norm=lambda width: nn.GroupNorm(2, width)),
        lambda: BasicBlock(act=nn.SiLU),
        lambda: BasicBlock(act=nn.LeakyReLU),
        lambda: BasicBlock(pre=True),
        lambda: BasicBlock(dilation=2),
        lambda: BasicBlock(drop=nn.Dropout(0.1)),
        lambda: BasicBlock(drop=Dropping()),
        Bottleneck,
    ],
)
def test_blocks_of_another_form_are_not_given_torchvisions(make):
    net = around(make())
    assert described(net, (3, 8, 8))[-1].kind == "other"
    copied = LocalSequential(net, AugLocal(2, joint_tail=False), 4, (3, 8, 8), fused=False).auxiliary[0].blocks[0]
    assert repr(copied) == repr(net[1])
    assert LocalSequential(net, Greedy(), 4, (3, 8, 8)).num_modules == 2


def test_dropout_of_nothing_is_no_other_form():
    for drop in (nn.Dropout(0.0), nn.Identity(), nn.Sequential()):
        assert described(around(BasicBlock(drop=drop)), (3, 8, 8))[-1].kind == "basic"


def test_a_stage_of_blocks_is_of_their_kind():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.Sequential(Kuangliu(4, 8), Kuangliu(8, 16)), nn.Flatten(), nn.LazyLinear(3)
    )
    net(torch.zeros(1, 3, 8, 8))
    assert [(layer.kind, layer.width) for layer in described(net, (3, 8, 8))] == [("conv", 4), ("basic", 16)]


def test_a_failing_block_leaves_no_hook_and_no_mode_behind():
    class Failing(Kuangliu):
        def forward(self, x):
            super().forward(x)
            raise KeyError("no luck")

    net = around(Failing(8, 8))
    with pytest.raises(ValueError, match="layers\\[1\\] .Failing. does not accept .* torch says: 'no luck'"):
        described(net, (3, 8, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch._C._len_torch_dispatch_stack() == 0

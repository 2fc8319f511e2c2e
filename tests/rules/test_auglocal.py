"""AugLocal against published and independently counted facts."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from auglocal_ext import AugLocal, LocalSequential, models
from auglocal_ext.nn import eager_type
from auglocal_ext.rules import Network

IMAGENET = {"joint_tail": False, "single_layer_norm": False}


def wrap(name, rule, modules=None):
    shape = models.input_shape(name)
    return LocalSequential(models.build(name), rule, 10 if shape[1] == 32 else 1000, shape, modules=modules)


def count(module):
    return sum(p.numel() for p in module.parameters())


def ratio_of_parameters(name, rule):
    with torch.device("meta"):
        net = wrap(name, rule)
    return count(net) / count(net.primary)


def ratio_of_flops(name, rule):
    """Forward + backward floating point operations of one pass over those of backpropagation."""
    with FakeTensorMode():
        net = wrap(name, rule)
        x, y = torch.randn(2, *net.network.input_shape), torch.zeros(2, dtype=torch.long)
        with FlopCounterMode(display=False) as local:
            net(x, y).loss.backward()
    return local.get_total_flops() / flops_of_backpropagation(name)


@cache
def flops_of_backpropagation(name):
    with FakeTensorMode():
        x, y = torch.randn(2, *models.input_shape(name)), torch.zeros(2, dtype=torch.long)
        net = models.build(name)
        with FlopCounterMode(display=False) as bp:
            nn.functional.cross_entropy(net(x), y).backward()
    return bp.get_total_flops()


# sampled layers m (the paper's d is m + 1): ratios to backpropagation, with slope 0.5 and without pyramid
PARAMETERS = {
    "resnet32": {1: (2.73, 2.73), 2: (3.87, 3.87), 3: (4.24, 4.95), 4: (4.65, 5.45), 5: (4.61, 5.81)},
    "resnet110": {1: (2.83, 2.83), 2: (4.43, 4.43), 3: (5.18, 6.20), 4: (6.23, 7.49), 5: (6.94, 8.81)},
}
FLOPS = {
    "resnet32": {1: (2.37, 2.37), 2: (2.38, 2.38), 3: (2.67, 3.08), 4: (3.09, 3.64), 5: (3.38, 4.07)},
    "resnet110": {1: (2.30, 2.30), 2: (2.55, 2.55), 3: (2.98, 3.47), 4: (3.71, 4.35), 5: (4.27, 5.19)},
}
CASES = [(name, m) for name in PARAMETERS for m in range(1, 6)]


@pytest.mark.parametrize(
    ("name", "m"),
    [pytest.param(n, m, marks=[pytest.mark.slow] if n == "resnet110" else []) for n, m in CASES],
)
def test_parameter_counts(name, m):
    for slope, expected in zip((0.5, 0.0), PARAMETERS[name][m], strict=True):
        assert ratio_of_parameters(name, AugLocal(m + 1, slope)) == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize(
    ("name", "m"),
    [pytest.param(n, m, marks=[pytest.mark.slow] if n == "resnet110" or m != 5 else []) for n, m in CASES],
)
def test_arithmetic(name, m):
    slopes = (0.5, 0.0) if m >= 3 else (0.5,)  # for m <= 2 the pyramid of slope 0.5 changes nothing
    for slope, expected in zip(slopes, FLOPS[name][m], strict=False):
        assert ratio_of_flops(name, AugLocal(m + 1, slope)) == pytest.approx(expected, abs=0.0051)


@pytest.mark.parametrize(
    ("name", "slope", "millions"),
    [
        ("resnet34", 0.0, 176.2),
        ("resnet34", 0.5, 150.2),
        pytest.param("resnet101", 0.5, 420.2, marks=pytest.mark.slow),
        pytest.param("resnet101", 0.0, 451.5, marks=pytest.mark.slow),
    ],
)
def test_imagenet_parameter_counts(name, slope, millions):
    with torch.device("meta"):
        net = wrap(name, AugLocal(5, slope, **IMAGENET))
    assert count(net) / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "slope", "expected"),
    [("resnet34", 0.0, 4.18), ("resnet34", 0.5, 3.73), ("resnet101", 0.0, 5.74), ("resnet101", 0.5, 5.21)],
)
def test_imagenet_arithmetic(name, slope, expected):
    assert ratio_of_flops(name, AugLocal(5, slope, **IMAGENET)) == pytest.approx(expected, abs=0.0051)


def conv_strides(net, k):
    """Stride with which each auxiliary block of module k shrinks its map, measured on shapes."""
    strides = []
    with torch.device("meta"):
        h = torch.empty(2, *net.network.last_layer(k).shape)
    for block in net.auxiliary[k].blocks:
        out = block(h)
        strides.append(h.shape[-1] // out.shape[-1])
        h = out
    return strides


def test_strides_of_resnet32():
    with torch.device("meta"):
        net = wrap("resnet32", AugLocal(6))
    assert conv_strides(net, 0) == [1, 2, 1, 2, 1]  # sampled 3, 6, 9, 12, 15
    with torch.device("meta"):
        net = wrap("resnet32", AugLocal(6, 0.0))
    assert conv_strides(net, 9) == [1, 2, 1, 1, 1]  # 10, 11, 13, 14, 15: layer 10 is the last of stage 2
    with torch.device("meta"):
        net = wrap("resnet32", AugLocal(2))
    assert conv_strides(net, 0) == [2]  # 16 -> 64 channels in one block: the second downsampling is dropped
    assert net.auxiliary[0].blocks[0].conv1.out_channels == 64
    assert net.network.ends == (*range(14), 15)


def test_strides_of_imagenet_networks():
    with torch.device("meta"):
        net = wrap("resnet34", AugLocal(5, 0.0, **IMAGENET))
        assert net.rule.sampled(net.network, 0) == [4, 8, 12, 16]
        assert [net.network.layers[i].width for i in (4, 8, 12, 16)] == [128, 256, 256, 512]
        assert conv_strides(net, 0) == [2, 2, 1, 2]
        net = wrap("resnet101", AugLocal(5, 0.0, **IMAGENET), modules=(0, 1, 32))
        # the stem puts out 64 channels, a first-stage Bottleneck 256: both have base width 64
        assert conv_strides(net, 0) == [2, 2, 1, 2] and conv_strides(net, 1) == [2, 2, 1, 2]
        assert conv_strides(net, 2) == [1]  # after layer 32


def test_vgg_blocks_pool_once_where_the_width_changes():
    with torch.device("meta"):
        net = wrap("vgg13", AugLocal(2, 0.0, joint_tail=False, head="vgg"))
    assert net.num_modules == 10
    first = net.auxiliary[0]
    kinds = [type(m).__name__ for m in first.blocks[0]]
    assert kinds == ["MaxPool2d", "Conv2d", "BatchNorm2d", "ReLU"]  # one pooling even for 64 -> 512
    assert first.blocks[0][1].bias is not None
    assert conv_strides(net, 0) == [2]
    assert conv_strides(net, 8) == [1]


@pytest.mark.parametrize(("m", "k"), [(1, 15), (3, 13), (5, 11)])
def test_number_of_modules(m, k):
    with torch.device("meta"):
        assert wrap("resnet32", AugLocal(m + 1)).num_modules == k
        full = wrap("resnet32", AugLocal(m + 1, joint_tail=False))
    assert full.num_modules == 16
    assert len(full.auxiliary[14].blocks) == 1  # one later layer is left, whatever m is


def test_norm_in_the_head_for_one_sampled_layer():
    with torch.device("meta"):
        net = wrap("resnet32", AugLocal(6, 1.0))
        assert [a.head.norm is None for a in net.auxiliary] == [len(a.blocks) > 1 for a in net.auxiliary]
        assert net.auxiliary[-1].head.norm is not None  # slope 1 tapers to one sampled layer
        assert wrap("resnet32", AugLocal(2, single_layer_norm=False)).auxiliary[0].head.norm is None


def test_blocks_are_fresh_and_unshared():
    net = LocalSequential(models.resnet_cifar(14, width=4), AugLocal(3), 10, (3, 16, 16))
    storages = [p.untyped_storage().data_ptr() for p in net.parameters()]
    assert len(set(storages)) == len(storages)
    block, twin = net.primary[-2], net.auxiliary[0].blocks[-1]
    assert block.conv2.weight.shape == twin.conv2.weight.shape
    assert not torch.equal(block.conv2.weight, twin.conv2.weight)


def test_grouped_modules_sample_from_their_last_layer():
    net = LocalSequential(models.resnet_cifar(20, width=4), AugLocal(3, 0.0), 10, (3, 16, 16), modules=3)
    assert net.network.ends == (3, 6, 9)
    assert net.rule.sampled(net.network, 0) == [6, 9]


def mlp():
    return nn.Sequential(
        nn.Linear(6, 8),
        nn.GELU(),
        nn.Linear(8, 12),
        nn.BatchNorm1d(12),
        nn.Tanh(),
        nn.Linear(12, 8),
        nn.GELU(),
        nn.Linear(8, 3),
    )


def test_linear_layers():
    net = LocalSequential(mlp(), AugLocal(3, joint_tail=False), 3, (6,))
    assert [eager_type(m).__name__ for m in net.auxiliary[0].blocks[0]] == ["Linear", "BatchNorm1d", "Tanh"]
    assert [eager_type(m).__name__ for m in net.auxiliary[0].blocks[1]] == ["Linear", "GELU"]
    net(torch.randn(4, 6), torch.tensor([0, 1, 2, 0])).loss.backward()


@pytest.mark.parametrize(("wanted", "none", "one"), [(None, False, True), (True, True, True), (False, False, False)])
def test_norms_stand_where_at_most_one_layer_is_sampled(wanted, none, one):
    def norms(depth):
        rule = AugLocal(depth, 0.0, joint_tail=False, single_layer_norm=wanted)
        return [a.head.norm is not None for a in LocalSequential(mlp(), rule, 3, (6,)).auxiliary]

    assert norms(1) == [none] * 2
    assert norms(2) == [one] * 2
    assert norms(3) == [False, one]  # behind the second module one layer is left


def test_convolutions_then_linear_layers():
    layers = nn.Sequential(
        nn.Conv2d(3, 8, 5, padding=2), nn.LeakyReLU(0.2), nn.Conv2d(8, 16, 3), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 4),
    )  # fmt: skip
    net = LocalSequential(layers, AugLocal(3, joint_tail=False), 4, (3, 12, 12))
    assert [layer.kind for layer in net.network.layers] == ["conv", "conv", "linear"]
    net(torch.randn(4, 3, 12, 12), torch.tensor([0, 1, 2, 3])).loss.backward()


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.einsum("nchw,cd->ndhw", x, self.weight)


def test_a_layer_that_cannot_be_copied_needs_a_factory():
    def layers():
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), Strange(), Strange(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        )

    with pytest.raises(ValueError, match="AugLocal copies layer 2 \\(Strange\\), and it is unknown.*block=factory"):
        LocalSequential(layers(), AugLocal(2), 4, (3, 8, 8))
    with pytest.raises(ValueError, match="layer 2 \\(Strange\\) has the parameter 'weight'.*block=factory"):
        LocalSequential(layers(), AugLocal(2), 4, (3, 8, 8), layout="channels_first")
    seen = []

    def factory(in_channels, out_channels, stride, layer):
        seen.append((in_channels, out_channels, stride, type(layer).__name__))
        return nn.Conv2d(in_channels, out_channels, 1)

    net = LocalSequential(layers(), AugLocal(2, block=factory), 4, (3, 8, 8))
    assert seen == [(8, 8, 1, "Sequential")]
    net(torch.randn(2, 3, 8, 8), torch.tensor([0, 1])).loss.backward()


def narrowing():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 8, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def test_where_widths_narrow_the_layers_are_copied():
    layers = narrowing()
    (block,) = LocalSequential(layers, AugLocal(2), 4, (3, 8, 8), modules=2).auxiliary[0].blocks
    assert [repr(part) for part in block] == [repr(part) for part in layers[2:4]]


def test_no_strides_are_inferred_from_narrowing_widths():
    for rule in (
        AugLocal(2, sampling="conv3x3", downsampling=True),
        AugLocal(2, block=lambda fan_in, fan_out, stride, layer: nn.Conv2d(fan_in, fan_out, 1, stride)),
    ):
        with pytest.raises(ValueError, match="layer 1 is narrower \\(8\\) than layer 0 before it \\(16\\)"):
            LocalSequential(narrowing(), rule, 4, (3, 8, 8), modules=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "at least 1; got 0"),
        ({"depth": 2.5}, "a whole number of at least 1; got 2.5"),
        ({"depth": True}, "a whole number of at least 1; got True"),
        ({"pyramid": 1.5}, "within 0 .. 1; got 1.5"),
        ({"head": "dense"}, "unknown auxiliary head 'dense'"),
        ({"head": "vgg", "single_layer_norm": True}, "head='vgg' has no such place"),
        ({"sampling": "conv1x1", "block": Strange}, "leave out block=factory"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        AugLocal(**options)


def test_too_deep_for_the_network():
    with pytest.raises(ValueError, match="AugLocal\\(depth=4\\).*has 4 layers.*depth <= 3"):
        LocalSequential(models.resnet_cifar(8), AugLocal(4), 10, (3, 32, 32))


@pytest.mark.parametrize("width", [4, 16])
def test_a_factory_of_another_width_is_refused_where_the_head_needs_it(width):
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)]
    rule = AugLocal(2, joint_tail=False, head="0c2f", block=lambda *args: nn.Conv2d(8, width, 1))
    with pytest.raises(ValueError, match=f"put out a shape of \\({width}, 8, 8\\), expected 8 channels"):
        LocalSequential(nn.Sequential(*layers), rule, 4, (3, 8, 8))


def test_rule_sees_the_network():
    net = LocalSequential(models.resnet_cifar(8, width=4), AugLocal(2), 10, (3, 16, 16))
    assert isinstance(net.network, Network)
    assert net.network.last_layer(0).shape == (4, 16, 16)

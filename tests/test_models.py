"""Networks: structure, parameter counts, torchvision weights."""

from __future__ import annotations

import pytest
import torch

from auglocal_ext import models
from auglocal_ext.layers import describe, probe_input


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    ("name", "layers", "parameters", "widths"),
    [
        ("resnet32", 16, 466_906, [16] * 6 + [32] * 5 + [64] * 5),
        ("resnet110", 55, 1_730_714, [16] * 19 + [32] * 18 + [64] * 18),
        ("resnet34", 17, 21_797_672, [64] * 4 + [128] * 4 + [256] * 6 + [512] * 3),
        ("resnet50", 17, 25_557_032, [64] * 4 + [128] * 4 + [256] * 6 + [512] * 3),
        ("resnet101", 34, 44_549_160, [64] * 4 + [128] * 4 + [256] * 23 + [512] * 3),
        ("vgg13", 10, 133_053_736, [64] * 2 + [128] * 2 + [256] * 2 + [512] * 4),
        ("vgg19", 16, 143_678_248, [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8),
    ],
)
def test_split_into_layers(name, layers, parameters, widths):
    with torch.device("meta"):
        net = models.build(name)
    shape = models.input_shape(name)
    described = describe(net, probe_input(net, shape)).layers
    assert len(described) == layers
    assert [layer.width for layer in described] == widths
    assert count(net) == parameters


def test_cifar_resnet_depths_and_width():
    net = models.resnet_cifar(8, num_classes=7, width=8)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert [n for n, _ in net.named_children()] == ["stem", "layer1_0", "layer2_0", "layer3_0", "classifier"]
    with pytest.raises(ValueError, match="6n \\+ 2.*got 9"):
        models.resnet_cifar(9)
    with pytest.raises(ValueError, match="width applies to CIFAR ResNets"):
        models.build("resnet34", width=8)
    with pytest.raises(ValueError, match="unknown network 'resnet33'"):
        models.build("resnet33")


TORCHVISION = {name: name for name in ("resnet18", "resnet34", "resnet50", "resnet101")} | {
    "vgg13": "vgg13_bn",
    "vgg19": "vgg19_bn",
}


@pytest.mark.parametrize(
    "name",
    ["resnet18", "resnet50", "vgg13"]
    + [pytest.param(n, marks=pytest.mark.slow) for n in ("resnet34", "resnet101", "vgg19")],
)
def test_torchvision_weights_give_equal_outputs(name):
    torchvision = pytest.importorskip("torchvision", exc_type=Exception)
    theirs = getattr(torchvision.models, TORCHVISION[name])(weights=None).eval()
    for module in theirs.modules():  # running statistics that are not 0 and 1, so that a swapped key shows
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
    ours = models.build(name).eval()
    ours.load_state_dict(models.from_torchvision(name, theirs.state_dict()))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_torchvision_key_map_refuses_other_networks():
    with pytest.raises(ValueError, match="can be loaded into resnet18.*got 'resnet32'"):
        models.from_torchvision("resnet32", {})
    with pytest.raises(ValueError, match="unexpected key 'features.51.weight'"):
        models.from_torchvision("vgg13", {"features.51.weight": torch.zeros(1)})

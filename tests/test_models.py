"""Networks: structure, parameter counts, torchvision weights."""

from __future__ import annotations

import re

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
        ("vit_t_16", 13, 5_717_416, [192] * 13),
        ("vit_s_16", 13, 22_050_664, [384] * 13),
        ("vit_b_16", 13, 86_567_656, [768] * 13),
        ("vit_b_32", 13, 88_224_232, [768] * 13),
        ("vit_l_16", 25, 304_326_632, [1024] * 25),
        ("vit_l_32", 25, 306_535_400, [1024] * 25),
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
    with torch.device("meta"):  # random weights of VGG take a second to make
        ours = models.build(name).eval()
    ours.load_state_dict(models.from_torchvision(name, theirs.state_dict()), assign=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def weights_of(name, classes=1000):
    """A state dict with torchvision's keys, without torchvision."""
    with torch.device("meta"):
        ours = models.build(name, num_classes=classes).state_dict()
    result = {}
    for key, value in ours.items():
        for new, old in (("stem.conv.", "conv1."), ("stem.bn.", "bn1."), ("classifier.fc.", "fc.")):
            key = key.replace(new, old)
        result[re.sub(r"^layer(\d)_(\d+)", r"layer\1.\2", key)] = torch.zeros(value.shape, dtype=value.dtype)
    return result


def test_fine_tuning_to_other_classes_gets_a_new_last_layer():
    theirs = weights_of("resnet18")
    net = models.resnet18(num_classes=7)
    fresh = models.from_torchvision("resnet18", theirs, num_classes=7)
    net.load_state_dict(fresh)
    assert net.classifier.fc.weight.shape == (7, 512) and net.classifier.fc.weight.std() > 0.01
    assert not net.layer4_1.conv2.weight.any() and fresh["stem.conv.weight"] is theirs["conv1.weight"]
    kept = models.from_torchvision("resnet18", theirs)
    assert kept["classifier.fc.weight"] is theirs["fc.weight"]
    with pytest.raises(RuntimeError, match="size mismatch for classifier.fc.weight"):
        net.load_state_dict(kept)
    own = models.from_torchvision("resnet18", weights_of("resnet18", classes=7))
    net.load_state_dict(own)
    assert not net.classifier.fc.weight.any()
    with pytest.raises(ValueError, match="num_classes is at least 1.*got 0"):
        models.from_torchvision("resnet18", theirs, num_classes=0)


def test_torchvision_weights_may_come_from_data_parallel_and_old_releases():
    theirs = weights_of("resnet18")
    prefixed = {f"module.{key}": value for key, value in theirs.items() if not key.endswith("num_batches_tracked")}
    ours = models.from_torchvision("resnet18", prefixed)
    expected = models.from_torchvision("resnet18", theirs)
    assert ours.keys() == {key for key in expected if not key.endswith("num_batches_tracked")}
    models.resnet18().load_state_dict(ours)


def test_torchvision_key_map_refuses_other_networks():
    with pytest.raises(ValueError, match="can be loaded into resnet18.*got 'resnet32'"):
        models.from_torchvision("resnet32", {})
    with pytest.raises(ValueError, match="unexpected key 'features.51.weight'.*torchvision's vgg13_bn"):
        models.from_torchvision("vgg13", {"features.51.weight": torch.zeros(1)})
    for name, other, message in (
        ("resnet18", "resnet34", "unexpected key 'layer1.2.conv1.weight': expected .* torchvision's resnet18"),
        ("resnet34", "resnet18", "keys are missing, the first is 'layer1_2.conv1.weight': .*resnet34"),
        ("resnet34", "resnet50", r"'layer1.0.conv1.weight' has shape \(64, 64, 1, 1\), not \(64, 64, 3, 3\)"),
    ):
        with pytest.raises(ValueError, match=message):
            models.from_torchvision(name, weights_of(other))
    with pytest.raises(ValueError, match="keys are missing"):
        models.from_torchvision("resnet18", {})
    half = {(f"module.{key}" if i % 2 else key): v for i, (key, v) in enumerate(weights_of("resnet18").items())}
    with pytest.raises(ValueError, match="unexpected key 'module.bn1.weight'"):
        models.from_torchvision("resnet18", half)


def test_what_is_no_state_dict_is_refused_with_the_way_out(tmp_path):
    theirs = weights_of("resnet18")
    for given, message in (
        (tmp_path / "r.pth", r"got a path; load the file first: torch.load\(.*r.pth.*weights_only=True"),
        ("resnet18.pth", r'got a path; load the file first: torch.load\("resnet18.pth"'),
        (models.resnet18(), "got a network; pass its .state_dict"),
        (list(theirs), "got list"),
        ({"model": theirs, "optimizer": {}, "epoch": 3}, "mappings under 'model', 'optimizer'; pass the one"),
        ({"conv1.weight": 3}, "'conv1.weight' holds int"),
    ):
        with pytest.raises(TypeError, match=message):
            models.from_torchvision("resnet18", given)

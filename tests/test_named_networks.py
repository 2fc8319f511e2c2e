"""Networks by name, of this package, torchvision and timm, and published weights out of files."""

from __future__ import annotations

import builtins
import importlib

import pytest
import torch
from torch import nn

from auglocal_ext import models
from auglocal_ext.models import check_name, default_classes, default_input_shape, network_by_name


@pytest.fixture(scope="module")
def torchvision():
    return pytest.importorskip("torchvision", exc_type=Exception, reason="needs torchvision")


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="needs timm")


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a download")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)


def equal(network, other):
    ours, theirs = network.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_names_of_this_package():
    net = network_by_name("resnet8", 7, width=4)
    assert isinstance(net, nn.Sequential) and net(torch.rand(2, 3, 32, 32)).shape == (2, 7)
    assert (default_classes("resnet8"), default_input_shape("resnet8")) == (10, (3, 32, 32))
    assert (default_classes("vgg19"), default_input_shape("vgg19")) == (1000, (3, 224, 224))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet33", "unknown network 'resnet33', did you mean .*resnet32.*; known: resnet8.* torchvision:NAME"),
        ("keras:resnet50", "unknown network 'keras:resnet50'"),
        ("timm:", "unknown network 'timm:'"),
    ],
)
def test_unknown_names(name, message):
    for take in (check_name, network_by_name, default_input_shape):
        with pytest.raises(ValueError, match=message):
            take(name)


def test_of_torchvision(torchvision):
    with torch.device("meta"):
        net = network_by_name("torchvision:resnet50", 10)
        assert type(net) is torchvision.models.ResNet and net.fc.out_features == 10
        assert network_by_name("torchvision:resnet50").fc.out_features == 1000
        assert network_by_name("torchvision:vit_b_32", image_size=64).image_size == 64
        dense = network_by_name("torchvision:fcn_resnet50")
    assert dense.classifier[-1].out_channels == 21 and dense.aux_classifier is None
    shapes = {"resnet50": 224, "inception_v3": 299, "fcn_resnet50": 520}
    for name, size in shapes.items():
        assert default_input_shape(f"torchvision:{name}") == (3, size, size)
    for name, message in (
        ("resnet5", r"torchvision has no network 'resnet5'.*did you mean resnet\d+ or .*list_models\(\) has all"),
        ("fasterrcnn_resnet50_fpn", "for classification or segmentation"),
    ):
        with pytest.raises(ValueError, match=message):
            network_by_name(f"torchvision:{name}")
    with pytest.raises(ValueError, match="width applies to this package's CIFAR ResNets, not to torchvision:resnet18"):
        network_by_name("torchvision:resnet18", width=8)


def test_of_timm(timm):
    net = network_by_name("timm:test_vit", 5)
    assert net(torch.rand(1, 3, 160, 160)).shape == (1, 5)
    assert default_input_shape("timm:test_vit") == (3, 160, 160) and default_classes("timm:test_vit") == 1000
    small = network_by_name("timm:test_vit.r160_in1k", 5, image_size=96)
    assert small(torch.rand(1, 3, 96, 96)).shape == (1, 5)
    assert network_by_name("timm:test_resnet", image_size=64)(torch.rand(1, 3, 64, 64)).shape == (1, 1000)
    for name, message in (
        ("convnext_tin", "timm has no network 'convnext_tin', did you mean convnext_tiny"),
        ("resnet50.a1_in1", "timm has no weights 'a1_in1' of resnet50, did you mean resnet50.a1_in1k"),
        ("hf-hub:someone/model", "timm has no network 'hf-hub:someone/model'"),
    ):
        for take in (network_by_name, default_input_shape):
            with pytest.raises(ValueError, match=message):
                take(f"timm:{name}")


@pytest.mark.parametrize(("library", "name"), [("torchvision", "resnet18"), ("timm", "resnet18")])
def test_a_library_that_is_not_there(monkeypatch, library, name):
    load = importlib.import_module

    def missing(wanted, *arguments):
        if wanted == library:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        return load(wanted, *arguments)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=f"{library}, which is not installed: pip install {library}"):
        network_by_name(f"{library}:{name}")


def test_weights_of_torchvision(torchvision, tmp_path):
    theirs = torchvision.models.squeezenet1_1(weights=None)
    path = tmp_path / "squeezenet.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in theirs.state_dict().items()}}, path)
    assert equal(network_by_name("torchvision:squeezenet1_1", weights=path), theirs)
    assert equal(network_by_name("torchvision:squeezenet1_1", 1000, weights=path), theirs)
    tuned = network_by_name("torchvision:squeezenet1_1", 5, weights=path)
    assert tuned.classifier[1].weight.shape == (5, 512, 1, 1)
    assert torch.equal(tuned.features[0].weight, theirs.features[0].weight)
    wrong = tmp_path / "wrong.pth"
    for key, shape in (("features.0.weight", (64, 3, 7, 7)), ("features.0.bias", (32,))):
        torch.save({**theirs.state_dict(), key: torch.zeros(shape)}, wrong)
        with pytest.raises(ValueError, match=f"not the weights of torchvision:squeezenet1_1: '{key}' has shape"):
            network_by_name("torchvision:squeezenet1_1", 5, weights=wrong)
    with pytest.raises(ValueError, match="weights of torchvision:resnet18: .* are missing, the first is 'conv1.weight"):
        network_by_name("torchvision:resnet18", weights=path)
    torch.save(torchvision.models.squeezenet1_1(weights=None, num_classes=7).state_dict(), path)
    with pytest.raises(ValueError, match="for 7 classes and torchvision:squeezenet1_1 has 1000: say num_classes=7"):
        network_by_name("torchvision:squeezenet1_1", weights=path)


def test_weights_of_a_segmentation_network_leave_out_the_head_for_training(torchvision, tmp_path):
    build = torchvision.models.segmentation.lraspp_mobilenet_v3_large
    theirs = build(weights=None, weights_backbone=None)
    torch.save({**theirs.state_dict(), "aux_classifier.0.weight": torch.zeros(3)}, tmp_path / "lraspp.pth")
    assert equal(network_by_name("torchvision:lraspp_mobilenet_v3_large", weights=tmp_path / "lraspp.pth"), theirs)


def test_weights_of_timm(timm, tmp_path):
    save = pytest.importorskip("safetensors.torch").save_file
    theirs = timm.create_model("test_resnet", pretrained=False)
    path = tmp_path / "model.safetensors"
    save(theirs.state_dict(), path)
    assert equal(network_by_name("timm:test_resnet", weights=path), theirs)
    tuned = network_by_name("timm:test_resnet", 3, weights=path)
    assert tuned.get_classifier().out_features == 3 and torch.equal(tuned.conv1[0].weight, theirs.conv1[0].weight)


def test_weights_of_this_packages_networks(tmp_path):
    ours = models.build("resnet8", 7)
    torch.save(ours.state_dict(), tmp_path / "own.pt")
    assert equal(network_by_name("resnet8", 7, tmp_path / "own.pt"), ours)
    tuned = network_by_name("resnet8", 3, tmp_path / "own.pt")
    assert torch.equal(tuned[0][0].weight, ours[0][0].weight) and tuned.classifier.fc.out_features == 3


def test_torchvisions_weights_in_this_packages_networks(torchvision, tmp_path):
    theirs = torchvision.models.resnet18(weights=None)
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    net = network_by_name("resnet18", 4, tmp_path / "resnet18.pth")
    assert torch.equal(net[0][0].weight, theirs.conv1.weight) and net.classifier.fc.out_features == 4


def test_files_that_hold_no_weights(tmp_path, monkeypatch):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not a checkpoint")
    other = tmp_path / "other.pth"
    torch.save({"epoch": 3, "optimizer": {}}, other)
    whole = tmp_path / "whole.pth"
    torch.save(nn.Linear(2, 2), whole)
    tensors = tmp_path / "model.safetensors"
    tensors.write_bytes(b"no tensors")
    for path, message in (
        (tmp_path / "absent.pth", "absent.pth: no such file"),
        (broken, "expected a state dict saved by torch.save"),
        (whole, "expected a state dict saved by torch.save"),
        (other, "found a mapping with the keys 'epoch', 'optimizer'"),
    ):
        with pytest.raises(ValueError, match=message):
            network_by_name("resnet8", weights=path)
    load = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("safetensors"):
            raise ImportError(name)
        return load(name, *arguments, **options)

    if importlib.util.find_spec("safetensors"):
        with pytest.raises(ValueError, match="no file of safetensors"):
            network_by_name("resnet8", weights=tensors)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match="to read this file, pip install safetensors"):
        network_by_name("resnet8", weights=tensors)

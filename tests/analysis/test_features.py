"""Layer outputs are what inference runs through, in order, whatever wraps the network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from auglocal_ext import AugLocal, ContSup, LocalSequential, fuse, models
from auglocal_ext.analysis import layer_names, layer_outputs
from auglocal_ext.analysis.features import layer_features


def flat() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


def trained_statistics(network: nn.Module) -> nn.Module:
    """BatchNorm that is not the identity, so that leaving one out shows."""
    network.train()
    with torch.no_grad():
        network(torch.randn(16, 3, 16, 16) * 2 + 1)
    return network.eval()


def test_a_sequential_layer_by_layer():
    network = trained_statistics(flat())
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        outputs = [h.clone() for h in layer_outputs(network, x)]
        assert layer_names(network) == ("0", "3", "8")
        assert torch.equal(outputs[0], network[:3](x))
        assert torch.equal(outputs[1], network[:8](x))
        assert torch.equal(outputs[2], network(x))
    assert [read.shape for read in layer_features(network, (3, 16, 16))] == [(4, 16, 16), (6,), (5,)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("rule", [AugLocal(depth=2), ContSup("R1E"), ContSup("E")], ids=["auglocal", "R1E", "E"])
def test_a_local_network_as_in_inference(rule, fused):
    net = LocalSequential(models.resnet8(width=4), rule, 10, (3, 16, 16), fused=fused)
    net = trained_statistics(net)
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        *layers, logits = layer_outputs(net, x)
        assert layer_names(net) == ("stem", "layer1_0", "layer2_0", "layer3_0", "classifier")
        assert [tuple(h.shape[1:]) for h in layers] == [(4, 16, 16), (4, 16, 16), (8, 8, 8), (16, 4, 4)]
        torch.testing.assert_close(logits, net(x))
        torch.testing.assert_close(layers[0], net.primary[0](x))
        # A module's own output, before the next one's context is added to it.
        modules, history = net.local_modules, []
        h = modules[0](x, history)
        torch.testing.assert_close(modules[1](h, history), layers[net.network.ends[1]])


def test_several_layers_in_a_module_with_context():
    net = trained_statistics(LocalSequential(models.resnet8(width=4), ContSup("R1E"), 10, (3, 16, 16), modules=2))
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        *layers, logits = layer_outputs(net, x)
        assert len(layers) == 4
        torch.testing.assert_close(logits, net(x))
        torch.testing.assert_close(layers[net.network.ends[0]], net.local_modules[0](x, []))


def test_fused_and_eager_agree():
    network = trained_statistics(models.resnet8(width=4))
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        eager = list(layer_outputs(network, x))
        fuse(network)
        for one, other in zip(eager, layer_outputs(network, x), strict=True):
            torch.testing.assert_close(one, other)


def test_outputs_are_made_when_asked_for():
    network = models.resnet8(width=4).eval()
    ran = []
    for name, child in network.named_children():
        child.register_forward_hook(lambda *_, name=name: ran.append(name))
    outputs = layer_outputs(network, torch.randn(2, 3, 16, 16))
    next(outputs)
    assert ran == ["stem"]


def test_another_kind_of_network():
    with pytest.raises(TypeError, match=r"nn\.Sequential whose children are the layers, got Linear"):
        layer_names(nn.Linear(3, 2))

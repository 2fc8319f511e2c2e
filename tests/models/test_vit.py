"""Vision transformers: against torchvision's, and as networks of local modules that read the class token."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from auglocal_ext import DGL, MAN, AugLocal, Greedy, LocalSequential, PredSim, localize, models
from auglocal_ext.layers import describe
from auglocal_ext.models import torchvision_weights

SIZES = LAYERS, WIDTH, HEADS = 2, 24, 3


def small(**options):
    return models.vit(*SIZES, 16, 32, 5, mlp_width=40, **options)


@pytest.fixture
def theirs(monkeypatch):
    """torchvision's class at a small size, whose weights load under the name of a large one."""
    torchvision = pytest.importorskip("torchvision", exc_type=Exception)
    monkeypatch.setitem(
        torchvision_weights._NETWORKS, "vit_b_16", functools.partial(models.vit, *SIZES, 16, mlp_width=40)
    )

    def make(image_size=32):
        torch.manual_seed(0)
        return torchvision.models.VisionTransformer(image_size, 16, LAYERS, HEADS, WIDTH, 40, num_classes=5)

    return make


def test_outputs_and_gradients_are_torchvisions(theirs):
    other, ours = theirs().double(), small().double()
    for parameter in other.parameters():  # biases that are not 0, so that a swapped key shows
        nn.init.normal_(parameter, 0.0, 0.3)
    ours.load_state_dict(models.from_torchvision("vit_b_16", other.state_dict()))
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    out, expected = ours(x), other(x)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    grads = {name: parameter.grad for name, parameter in other.named_parameters()}
    wanted = models.from_torchvision("vit_b_16", grads)
    assert wanted.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], msg=f"the gradient of {name}")


def test_weights_of_other_sizes_and_old_releases(theirs):
    large = theirs(64).state_dict()
    old = {key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): large[key] for key in large}
    found = models.from_torchvision("vit_b_16", old, num_classes=7)
    net = models.vit(*SIZES, 16, 64, 7, mlp_width=40)
    net.load_state_dict(found)
    with pytest.raises(RuntimeError, match="size mismatch for embedding.positions"):
        models.vit(*SIZES, 16, 32, 7, mlp_width=40).load_state_dict(found)
    with pytest.raises(ValueError, match=r"'encoder.pos_embedding' has shape \(1, 16, 24\), not \(1, 10, 24\)"):
        models.from_torchvision("vit_b_16", large | {"encoder.pos_embedding": torch.zeros(1, 16, 24)})


@pytest.mark.parametrize("name", ["vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32"])
def test_every_size_has_torchvisions_keys(name):
    torchvision = pytest.importorskip("torchvision", exc_type=Exception)
    with torch.device("meta"):
        other = getattr(torchvision.models, name)(weights=None).state_dict()
        ours = models.build(name).state_dict()
    found = models.from_torchvision(name, other)
    assert {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in ours.items()}


def test_initialised_as_torchvision():
    torchvision = pytest.importorskip("torchvision", exc_type=Exception)
    torch.manual_seed(0)
    ours = models.vit(1, 128, 2, 16, 224, 10)
    other = torchvision.models.VisionTransformer(224, 16, 1, 2, 128, 512, num_classes=10).state_dict()
    renamed = {torchvision_weights._vit_key(key): value for key, value in other.items()}
    for name, parameter in ours.named_parameters():
        if name == "block_0.attention.out.bias":
            assert not parameter.any()
        else:
            torch.testing.assert_close(
                parameter.std(), renamed[name].std(), rtol=0.15, atol=0.0, msg=f"the values of {name}"
            )


def test_images_and_patches_that_do_not_fit():
    with pytest.raises(ValueError, match="patch must divide image_size, got patches of 16 and images of 40"):
        models.vit(image_size=40)
    with pytest.raises(ValueError, match="takes images of 32 x 32, got 32 x 48"):
        small()(torch.zeros(1, 3, 32, 48))
    net = models.build("vit_t_16", 3, image_size=32)
    assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    assert models.network_by_name("vit_t_16", 3, image_size=64).embedding.image_size == 64


@pytest.mark.parametrize(
    "rule", [AugLocal(depth=1), AugLocal(depth=3), Greedy("0c2f"), PredSim(), DGL("0c2f"), MAN(head="linear")]
)
def test_every_head_reads_the_class_token(rule):
    torch.manual_seed(0)
    layers = models.vit(4, 24, 3, 16, 32, 5)
    assert {layer.features.layout for layer in describe(layers, torch.zeros(1, 3, 32, 32)).layers[:-1]} == {
        "class_token"
    }
    net = LocalSequential(layers, rule, 5, (3, 32, 32), modules=3).eval()
    h = torch.randn(2, 5, 24)
    for auxiliary in net.auxiliary:
        for part in auxiliary.modules():
            if isinstance(part, nn.Linear):
                nn.init.normal_(part.weight, 0.0, 0.3)
        changed = h.clone()
        changed[:, 1:] += 1
        attends = any(isinstance(part, models.EncoderBlock) for part in auxiliary.modules())
        assert torch.equal(auxiliary(h), auxiliary(changed)) is not attends
        changed = h.clone()
        changed[:, 0] += torch.randn(24)
        assert not torch.equal(auxiliary(h), auxiliary(changed))
    net.train()
    net(torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])).loss.backward()
    assert all(parameter.grad is not None for parameter in net.parameters() if parameter.requires_grad)


def test_localize_keeps_the_layout_that_a_block_says():
    net = localize(small(), AugLocal(depth=2), 5, ["block_0"], input_shape=(3, 32, 32))
    assert net.network.layers[0].features.layout == "class_token"
    net(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])).loss.backward()


def test_layouts_that_a_module_or_the_user_says():
    layers = models.vit(2, 24, 3, 16, 32, 5)
    said = describe(layers, torch.zeros(1, 3, 32, 32), "channels_last").layers
    assert said[0].features.layout == "channels_last"
    layers.block_0.features_layout = "class token"
    with pytest.raises(ValueError, match="EncoderBlock.features_layout is one of channels_first.*got 'class token'"):
        describe(layers, torch.zeros(1, 3, 32, 32))

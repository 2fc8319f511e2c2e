"""What layers hand on: axes found by the layers, said with layout=, or refused; and what is done with them."""

from __future__ import annotations

import pytest
import torch
from layouts import Block, ConvNeXt, First, Patches, classifier, found, swin, vit
from torch import nn

from auglocal_ext import AugLocal, Greedy, LocalSequential
from auglocal_ext.layers import Features, describe, observe, probe_input, vectors
from auglocal_ext.nn import eager_type


def test_axes_of_features():
    first, last = Features((16, 4, 5)), Features((4, 5, 16), "channels_last")
    for features in (first, last):
        assert (features.channels, features.positions, features.is_2d) == (16, (4, 5), True)
        x = torch.randn(2, *features.shape)
        assert features.channels_first(x).shape == (2, 16, 4, 5)
        assert features.channels_first(x).data_ptr() == x.data_ptr()
        assert torch.equal(features.restored(features.channels_first(x)), x)
        torch.testing.assert_close(features.pooled(x), features.channels_first(x).flatten(2).mean(2))
        assert features.with_channels(8).channels == 8 and features.with_channels(8).positions == (4, 5)
    tokens, token = Features((7, 16), "channels_last"), Features((7, 16), "class_token")
    x = torch.randn(2, 7, 16)
    assert tokens.is_tokens and token.is_tokens and not tokens.is_2d
    torch.testing.assert_close(tokens.pooled(x), x.mean(1))
    assert torch.equal(token.pooled(x), x[:, 0])
    assert vectors(5).is_vector and torch.equal(vectors(5).pooled(x[:, 0, :5]), x[:, 0, :5])
    with pytest.raises(ValueError, match="a class token is the first of tokens"):
        Features((4, 4, 16), "class_token")
    assert str(first) == "maps of 16 channels and 4 x 5 positions"
    assert str(token) == "7 tokens of 16 features, the first of them a class token"


def test_channels_are_found_by_the_layers():
    assert [f.layout for f in found(vit(), (3, 8, 8))[:-1]] == ["channels_last"] * 2
    assert [f.layout for f in found(swin(), (3, 8, 8))[:-1]] == ["channels_last"] * 2
    convnext = nn.Sequential(nn.Conv2d(3, 8, 2, 2), ConvNeXt(8), ConvNeXt(8), classifier(8))
    assert [f.layout for f in found(convnext, (3, 8, 8))[:-1]] == ["channels_first"] * 2
    sound = nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Conv1d(8, 8, 3), nn.Flatten(), nn.LazyLinear(3))
    sound(torch.zeros(1, 2, 12))
    assert found(sound, (2, 12))[0] == Features((8, 10))
    volume = nn.Sequential(nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4), nn.Conv3d(4, 4, 2), nn.Flatten(), nn.LazyLinear(3))
    volume(torch.zeros(2, 1, 5, 5, 5))
    assert found(volume, (1, 5, 5, 5))[0] == Features((4, 4, 4, 4))


@pytest.mark.parametrize("width", [4, 8])
def test_of_maps_as_wide_as_they_are_high_too(width):
    """C = H = W, where shapes alone tell nothing: the layer that takes just this tensor does."""
    net = nn.Sequential(nn.Conv2d(3, width, 2, 2), ConvNeXt(width), ConvNeXt(width), classifier(width))
    shape = (3, 2 * width, 2 * width)
    assert [f.layout for f in found(net, shape)[:-1]] == ["channels_first"] * 2
    net = nn.Sequential(*swin(width, width)[1:])
    net = nn.Sequential(nn.Conv2d(3, width, 2, 2), *net)
    assert [f.layout for f in found(net, shape)[:-1]] == ["channels_last"] * 2


def test_torchvisions_swin():
    torchvision = pytest.importorskip("torchvision", exc_type=Exception)
    with torch.device("meta"):
        model = torchvision.models.swin_t(weights=None, num_classes=3)
        stem, *stages = model.features  # of blocks, and of single layers that merge patches
        blocks = [block for stage in stages for block in (stage if isinstance(stage, nn.Sequential) else [stage])]
        net = nn.Sequential(stem, *blocks, model.norm, model.permute, model.avgpool, model.flatten, model.head)
        layers = describe(net, probe_input(net, (3, 64, 64))).layers
    assert len(layers) == 1 + 12 + 3
    assert [layer.features.layout for layer in layers[:-1]] == ["channels_last"] * 15
    assert [layer.width for layer in layers[:3]] == [96, 96, 96] and layers[-1].width == 768


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        return torch.einsum("nchw,cd->ndhw", x, self.weight)


def unknown():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), Strange(), Strange(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )


def test_where_nothing_tells_it_is_refused():
    assert found(unknown(), (3, 8, 8))[1] is None
    with pytest.raises(
        ValueError, match=r"layer 1 \(Strange\).*no layer around it tells which axis.*layout='channels_first'"
    ):
        LocalSequential(unknown(), Greedy(), 3, (3, 8, 8))
    net = LocalSequential(unknown(), Greedy(), 3, (3, 8, 8), layout="channels_first")
    assert [a.head.read.shape for a in net.auxiliary] == [(8, 6, 6), (8, 6, 6)]
    net = LocalSequential(unknown(), Greedy(), 3, (3, 8, 8), layout=[None, "channels_first", None])
    net(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])).loss.backward()


def test_layers_that_disagree():
    """A linear layer over the width of a map: each of the two takes another axis for the channels."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(6, 6), nn.Conv2d(4, 4, 3), classifier(4))
    assert found(net, (3, 8, 8))[0] is None
    with pytest.raises(ValueError, match="the layers around it disagree about which axis"):
        LocalSequential(net, Greedy(), 3, (3, 8, 8))
    LocalSequential(net, Greedy(), 3, (3, 8, 8), layout="channels_first")


def test_what_is_said_must_not_contradict_the_layers():
    with pytest.raises(ValueError, match="layer 0: layout='channels_first' is said of features of shape .5, 8."):
        LocalSequential(vit(), Greedy(), 3, (3, 8, 8), layout="channels_first")
    with pytest.raises(
        ValueError, match="layer 0: layout='channels_last'.*takes axis 1.*one layout .or None. for each layer"
    ):
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), classifier(8))
        LocalSequential(net, Greedy(), 3, (3, 8, 8), layout="channels_last")
    for wrong in ("nchw", ["channels_last"], [None, None, "tokens"]):
        with pytest.raises(ValueError, match="layout is one of channels_first, channels_last, class_token"):
            LocalSequential(vit(), Greedy(), 3, (3, 8, 8), layout=wrong)


@pytest.mark.parametrize("layout", [None, "class_token"])
def test_tokens_are_pooled_by_mean_or_by_class_token(layout):
    net = LocalSequential(vit(), Greedy(), 3, (3, 8, 8), layout=layout).double()
    x, y = torch.randn(4, 3, 8, 8).double(), torch.tensor([0, 1, 2, 0])
    module = net.local_modules[0]
    h = module(x)
    linear = module.auxiliary.head.linear
    pooled = h[:, 0] if layout else h.mean(1)
    expected = nn.functional.cross_entropy(linear(pooled), y)
    torch.testing.assert_close(module.local_loss(h, y), expected)


def test_integer_tokens_are_an_example():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Embedding(11, 8), Block(8), Block(8), First(), nn.Linear(8, 3))
    tokens = torch.randint(11, (1, 6))
    net = LocalSequential(layers, Greedy(), 3, example_input=tokens)
    assert net.network.input_shape == (6,) and net.network.input_dtype == torch.int64
    assert [f.layout for f in (net.network.features(0), net.network.features(1))] == ["channels_last"] * 2
    x, y = torch.randint(11, (4, 6)), torch.tensor([0, 1, 2, 0])
    net(x, y).loss.backward()
    assert all(p.grad is not None for p in net.parameters())
    assert net(x).shape == (4, 3) and net.export()(x).shape == (4, 3)
    with pytest.raises(
        TypeError, match="x must be integers, as the torch.int64 this network was wrapped for; got torch.float32"
    ):
        net(x.float(), y)
    with pytest.raises(ValueError, match=r"x must have shape \(N, 6\)"):
        net(x[:, :5], y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "pass either input_shape, such as .3, 32, 32., or example_input"),
        ({"input_shape": (6,), "example_input": torch.zeros(1, 6)}, "pass either input_shape"),
        ({"input_shape": 6}, r"input_shape is the shape of one input .* or \(12,\) of vectors; got 6"),
        ({"input_shape": ()}, "input_shape is the shape of one input"),
        ({"input_shape": (0, 6)}, "input_shape is the shape of one input"),
        ({"input_shape": "6"}, "input_shape is the shape of one input"),
        (
            {"example_input": torch.zeros(6)},
            r"example_input must be a tensor \(1, \*input_shape\) with the batch first, got \(6,\)",
        ),
        ({"example_input": [1, 2]}, "example_input must be a tensor .* got list"),
    ],
)
def test_wrong_inputs(options, message):
    with pytest.raises(ValueError, match=message):
        LocalSequential(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), Greedy(), 3, **options)


def test_an_example_may_be_floating_point_and_of_another_dtype_than_the_network():
    layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    net = LocalSequential(layers, Greedy(), 3, example_input=torch.randn(4, 6))
    assert net.network.input_shape == (6,) and net.network.input_dtype is None
    net(torch.randn(4, 6).double(), torch.tensor([0, 1, 2, 0])).loss.backward()


def test_auxiliary_blocks_of_tokens():
    """Linear layers sampled from tokens work on tokens; blocks of another form are copied, or come from a factory."""
    layers = nn.Sequential(Patches(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), First(), nn.Linear(8, 3))
    net = LocalSequential(layers, AugLocal(3, joint_tail=False, pyramid=0.0), 3, (3, 8, 8))
    for block in net.auxiliary[0].blocks:  # the last layer's linear layer is before its pooling
        assert block(torch.randn(2, 5, 8)).shape == (2, 5, 8)
    pooled = nn.Sequential(Patches(8), nn.Linear(8, 8), First(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3))
    net = LocalSequential(pooled, AugLocal(2, joint_tail=False), 3, (3, 8, 8))
    assert net.auxiliary[0].blocks[0](torch.randn(2, 5, 8)).shape == (2, 8)  # the last layer works on a vector
    net = LocalSequential(vit(), AugLocal(2, joint_tail=False), 3, (3, 8, 8), layout="class_token")
    assert [eager_type(part) for part in net.auxiliary[0].blocks[0]] == [Block, nn.LayerNorm]  # a copy of the last one
    seen = []

    def factory(fan_in, fan_out, stride, layer):
        seen.append((fan_in, fan_out, stride))
        return Block(fan_out)

    net = LocalSequential(vit(), AugLocal(2, joint_tail=False, block=factory), 3, (3, 8, 8), layout="class_token")
    assert set(seen) == {(8, 8, 1)}
    net(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0])).loss.backward()


def test_observing_leaves_no_hook_behind():
    net = vit()
    with pytest.raises(RuntimeError):
        observe(list(net), torch.zeros(1, 4, 8, 8))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())

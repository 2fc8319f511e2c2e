"""A layer whose forward is more than its modules is copied as a segment, with a model of its own and fresh values."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from isolation import assert_gradient_isolated, assert_same_values
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext import MAN, AugLocal, localize
from auglocal_ext.auxiliary import fresh_copy
from auglocal_ext.nn import deferred

X, Y = torch.linspace(-1, 1, 4 * 3 * 8 * 8).view(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])


class Masked(nn.Module):
    """Takes a mask besides its tokens."""

    def __init__(self):
        super().__init__()
        self.norm, self.mix, self.drop = nn.LayerNorm(8), nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, tokens, *, mask):
        return tokens + self.drop(self.mix(self.norm(tokens)).transpose(1, 2) @ mask).transpose(1, 2)


class Merge(nn.Module):
    """Makes one token of two, in a forward of its own."""

    def __init__(self):
        super().__init__()
        self.reduction, self.norm = nn.Linear(16, 8), nn.LayerNorm(8)

    def forward(self, tokens):
        return self.norm(self.reduction(torch.cat([tokens[:, ::2], tokens[:, 1::2]], -1)))


class Attentive(nn.Module):
    """Parameters and buffers that the forward itself uses, layers that take a table, and code between submodules."""

    def __init__(self):
        super().__init__()
        self.patches, self.stem_norm = nn.Conv2d(3, 8, 2, 2), nn.BatchNorm2d(8)
        self.position = nn.Parameter(torch.randn(1, 16, 8))
        self.register_buffer("steps", torch.arange(16.0), persistent=False)
        self.layers = nn.ModuleList(Masked() for _ in range(2))
        self.merge = Merge()
        self.last, self.norm, self.head = nn.Linear(8, 12), nn.LayerNorm(12), nn.Linear(12, 4)

    def reset_parameters(self):
        nn.init.constant_(self.position, 0.25)

    def forward(self, x):
        h = F.relu(self.stem_norm(self.patches(x.to(self.patches.weight.dtype)))).flatten(2).transpose(1, 2)
        h = h + self.position
        mask = (self.steps[:, None] <= self.steps).to(h.dtype) / 16
        for layer in self.layers:
            h = layer(h, mask=mask)
        return self.head(F.gelu(self.norm(torch.tanh(self.last(self.merge(h))))).mean(1))


class Vectors(nn.Module):
    """Ends in code, as MobileNetV3: pooling and flattening, a hidden layer, its activation, the classifier."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.norm = nn.BatchNorm2d(12)
        self.hidden, self.drop, self.head = nn.Linear(12, 16), nn.Dropout(0.2), nn.Linear(16, 4)

    def forward(self, x):
        h = F.relu(self.norm(self.two(F.relu(self.one(x)))))
        h = torch.flatten(F.adaptive_avg_pool2d(h, 1), 1)
        return self.head(self.drop(F.hardswish(self.hidden(h))))


def wrapped(model, modules=None, rule=None, **options):
    rule = AugLocal(2, joint_tail=False) if rule is None else rule
    return localize(model, rule, 4, modules, input_shape=(3, 8, 8), **options)


def spoiled(model):
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor is not getattr(model, "steps", None):
            tensor.data.fill_(math.nan)
    model.apply(lambda m: m.num_batches_tracked.fill_(7) if isinstance(m, nn.BatchNorm2d) else None)
    return model


@pytest.mark.parametrize("make", [Attentive, Vectors])
def test_copies_compute_what_the_layers_do(make):
    model = make()
    net = wrapped(model)
    assert net.num_modules > 2
    copied = 0
    for segment in list(net.network.primary)[1:-1]:
        made = fresh_copy(segment, "it")
        own = {**dict(segment.named_parameters()), **dict(segment.named_buffers())}
        mine = {**dict(made.named_parameters()), **dict(made.named_buffers())}
        assert list(own) == list(mine) and set(made.state_dict()) <= set(mine)
        assert sum(part is not None for m in made.model.modules() for part in m._parameters.values()) == len(
            list(made.parameters())
        )
        assert all(own[name] is not mine[name] for name in own)
        h = torch.randn(2, *segment.shape)
        for value in (True, False):
            with torch.no_grad():
                for name, tensor in own.items():
                    mine[name].copy_(tensor)
            model.train(value), made.train(value)
            outs = []
            for part in (segment, made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
                torch.manual_seed(1)
                outs.append(part(h))
            assert all(torch.equal(outs[0], each) for each in outs[1:])
        assert made.double()(h.double()).dtype == torch.float64
        copied += 1
    assert copied > 1


@pytest.mark.parametrize("make", [Attentive, Vectors])
def test_auxiliary_networks_have_no_value_of_the_model_and_train_apart_from_it(make):
    nets = []
    for source in (make(), spoiled(make())):
        torch.manual_seed(3)
        nets.append(wrapped(source))
    assert_same_values(*nets)
    assert_gradient_isolated(nets[0], X, Y)


def test_a_linear_layer_inside_a_module_that_does_more_is_copied_with_the_module():
    net = wrapped(Attentive(), [2], AugLocal(2, joint_tail=False, sampling="sequential"))
    assert [layer.kind for layer in net.network.layers] == ["conv", "other", "other", "linear", "linear"]
    (block,) = net.auxiliary[0].blocks
    assert isinstance(block, Merge) and block(torch.zeros(1, 16, 8)).shape == (1, 8, 8)


def test_what_is_refused():
    class Fixed(Attentive):
        reset_parameters = None

    with pytest.raises(ValueError, match=r"layer 1 .*parameter 'position', which no reset_parameters.*block=factory"):
        wrapped(Fixed(), [0], AugLocal(2, joint_tail=False, sampling="sequential"))
    with pytest.raises(ValueError, match="passes them more than one input"):
        wrapped(Attentive(), [1], MAN())


@pytest.mark.slow
def test_fake_meta_and_deferred_models():
    shapes = [parameter.shape for parameter in wrapped(Attentive(), 2).parameters()]
    with FakeTensorMode():
        assert [parameter.shape for parameter in wrapped(Attentive(), 2).parameters()] == shapes
    with torch.device("meta"):
        assert [parameter.shape for parameter in wrapped(Attentive(), 2).parameters()] == shapes
    with deferred(0):
        net = wrapped(Attentive(), 2)
    net.materialise("cpu")
    assert not any(tensor.isnan().any() for tensor in net.auxiliary.state_dict().values())
    net(X, Y).loss.backward()


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x * self.gate(x).sigmoid()


class Pooled(nn.Module):
    """Its last layer pools between code of its own and the classifier."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 8, 1), Gated()
        self.norm, self.pool, self.head = nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(2), nn.Linear(32, 4)

    def forward(self, x):
        h = self.norm(self.three(self.two(F.relu(self.one(x)))) + 1)
        return self.head(torch.flatten(self.pool(h), 1))


def test_the_last_layer_is_copied_up_to_its_pooling():
    (block,) = wrapped(Pooled().double(), [0]).auxiliary[0].blocks
    assert block(torch.zeros(1, 6, 4, 4, dtype=torch.float64)).shape == (1, 8, 4, 4)
    assert any(name.endswith("norm.weight") for name, _ in block.named_parameters())


class Skipping(nn.Module):
    """The output of the first layer is an input of the last one too."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(192, 8), Masked(), Masked()
        self.last, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        h = self.one(x.flatten(1)).unsqueeze(1)
        mask = torch.ones(1, 1)
        skip, h = h, self.two(h, mask=mask)
        return self.head(self.last(self.three(h, mask=mask) + skip).mean(1))


def test_a_layer_beside_a_skip_connection_over_a_cut_is_not_copied():
    with pytest.raises(ValueError, match="skip connections cross its cuts.*block=factory"):
        wrapped(Skipping(), ["one", "two"], skips="detach", layout="channels_last")
    sampled = AugLocal(2, joint_tail=False)
    wrapped(Skipping(), ["one"], sampled, layout="channels_last")

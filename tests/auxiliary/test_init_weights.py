"""Copies of layers are initialised by the model's ``_init_weights(module)``, as models of Hugging Face have it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from auglocal_ext import AugLocal, localize
from auglocal_ext.auxiliary import fresh_copy

Y = torch.tensor([0, 1, 2, 3])


class Config:
    std = 0.02
    scale = 0.125


class Weights(nn.Module):
    """A linear layer that no method of its own initialises."""

    def __init__(self, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(width, width)), nn.Parameter(torch.empty(width))

    def forward(self, h):
        return h @ self.weight + self.bias


class Layer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mix, self.scale = nn.LayerNorm(width), Weights(width), nn.Parameter(torch.empty(width))

    def forward(self, h, mask=None, **options):
        return h + self.scale * self.mix(self.norm(h)).relu(), None


class Pretrained(nn.Module):
    """Initialises by ``_init_weights``, innermost modules first; a model inside does so by itself, and once."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    def _init_weights(self, module):
        if isinstance(module, (Weights, nn.Linear)):
            nn.init.normal_(module.weight, std=self.config.std)
            module.bias.data.zero_()
        elif isinstance(module, Layer):
            nn.init.constant_(module.scale, self.config.scale)

    def initialise(self):
        def walk(module, method):
            for child in module.children():
                walk(child, child._initialise if isinstance(child, Pretrained) else method)
            method(module)

        walk(self, self._initialise)
        return self

    def _initialise(self, module):
        if not getattr(module, "_is_hf_initialized", False):
            self._init_weights(module)
            module._is_hf_initialized = True


class Encoder(Pretrained):
    def __init__(self, config, depth):
        super().__init__(config)
        self.layers = nn.ModuleList(Layer(8) for _ in range(depth))

    def forward(self, h):
        for layer in self.layers:
            h = layer(h, mask=None, output_attentions=False)[0]
        return h


class Inner(Config):
    std, scale = 0.5, 0.25


class Classifier(Pretrained):
    """An encoder with a configuration of its own in a model with another one."""

    def __init__(self):
        super().__init__(Config())
        self.embed, self.encoder = nn.Linear(12, 8), Encoder(Inner(), 3)
        self.last, self.norm, self.head = Weights(8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.initialise()

    def forward(self, x):
        h = self.encoder(self.embed(x.flatten(1).unflatten(1, (16, 12))))
        return {"logits": self.head(self.norm(self.last(h)).mean(1))}


def wrapped(model, modules=None):
    rule = AugLocal(4, 0.0, joint_tail=False)
    return localize(model, rule, 4, modules, input_shape=(3, 8, 8), output="logits", layout="channels_last")


def test_copies_start_as_the_model_initialises_its_layers():
    model = Classifier()
    for parameter in model.parameters():
        parameter.data.fill_(math.nan)
    net = wrapped(model, [0])
    assert all(getattr(layer, "_is_hf_initialized", False) for layer in model.encoder.layers)
    first, second, last = net.auxiliary[0].blocks
    assert isinstance(last[0], Weights)
    for part, std in ((first, 0.5), (second, 0.5), (last, 0.02)):
        (weight,) = (parameter for parameter in part.parameters() if parameter.dim() == 2)
        torch.testing.assert_close(weight.std(), torch.tensor(std), rtol=0.4, atol=0)
    scales = [p for name, p in net.auxiliary.named_parameters() if name.endswith("scale")]
    assert len(scales) == 2 and all(bool((scale == 0.25).all()) for scale in scales)
    assert not any(tensor.isnan().any() for tensor in net.auxiliary.state_dict().values())
    assert all(parameter.isnan().all() for parameter in model.parameters())


class Skipping(Pretrained):
    def _init_weights(self, module):
        if isinstance(module, Weights):
            nn.init.zeros_(module.weight)


class Reading(Pretrained):
    def __init__(self, config):
        super().__init__(config)
        self.value = nn.Parameter(torch.ones(8))

    def _init_weights(self, module):
        if isinstance(module, Weights):
            nn.init.zeros_(module.weight)
            module.bias.copy_(self.value)


class Named(Pretrained):
    def _init_weights(self, module, name):
        raise AssertionError("a method of another form")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            Skipping,
            r"parameter 'bias', which no reset_parameters\(\) of Weights or _init_weights\(\) of the model fills",
        ),
        (Reading, "initialised by an _init_weights.. that reads parameters or buffers of the network.*block=factory"),
        (Named, r"parameter 'weight', which no reset_parameters\(\) of Weights fills.*block=factory"),
    ],
)
def test_what_the_model_does_not_initialise_is_refused(make, message):
    model = make(Config())
    model.layer = Weights(8)
    with pytest.raises(ValueError, match=message):
        fresh_copy(model.layer, "layer 1", model)

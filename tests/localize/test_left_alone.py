"""What ``localize`` leaves of a model as it was, beside parameters and names."""

from __future__ import annotations

import torch
from torch import nn

from auglocal_ext import AugLocal, Greedy, localize

SHAPE = (3, 8, 8)


class Cached(nn.Module):
    """Keeps what it has computed in eval mode, until it is trained again."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.cache, self.calls = {}, 0

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x):
        self.calls += 1
        if self.training:
            return x * (2 * self.weight)[:, None, None]
        if "doubled" not in self.cache:
            self.cache["doubled"] = 2 * self.weight
            self.found = True
        return x * self.cache["doubled"][:, None, None]

    def train(self, mode=True):
        if mode:
            self.cache.clear()
        return super().train(mode)


def network():
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), Cached(8), nn.ReLU()) for _ in range(3)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def test_caches_of_eval_mode_do_not_stay_behind():
    for rule in (Greedy(), AugLocal(2)):
        model = network()
        localize(model, rule, 5, input_shape=SHAPE)
        for part in (each for each in model.modules() if isinstance(each, Cached)):
            assert part.cache == {} and part.calls == 0 and not hasattr(part, "found") and part.training


class Captures(nn.Module):
    """Adds a hook to its layer when it is first called, as models of Hugging Face do to capture hidden states."""

    def __init__(self):
        super().__init__()
        self.layers = network()
        self.seen = []

    def forward(self, x):
        if not hasattr(self, "captures"):
            self.layers[1].register_forward_hook(lambda module, args, output: self.seen.append(1))
            self.captures = True
        return self.layers(x)


def test_hooks_of_a_first_call_in_eval_mode_do_not_stay_behind():
    model = Captures()
    localize(model, Greedy(), 5, input_shape=SHAPE)
    assert not model.layers[1]._forward_hooks and not hasattr(model, "captures")
    model.seen = []
    model(torch.randn(2, *SHAPE))
    model(torch.randn(2, *SHAPE))
    assert len(model.seen) == 2

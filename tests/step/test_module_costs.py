"""FLOPs and seconds of each local module, by which stages are balanced."""

from __future__ import annotations

import copy
import time

import pytest
import torch
from torch import nn

from auglocal_ext import Greedy, LocalSequential
from auglocal_ext.step.module_costs import module_flops, module_times


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)


class ReadsBack(nn.Module):
    def forward(self, x):
        return x if x.sum().item() > 0 else -x


def test_flops_do_not_depend_on_values_that_are_read_back():
    net = LocalSequential(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)), Greedy(), 3, (6,))
    for optimizer in (torch.optim.ASGD, torch.optim.Adafactor):
        assert module_flops(net, optimizer) == module_flops(net, torch.optim.SGD)
    layers = nn.Sequential(nn.Linear(6, 6), ReadsBack(), nn.Linear(6, 3))
    net = LocalSequential(layers, Greedy(), 3, example_input=torch.ones(2, 6))
    with pytest.raises(ValueError, match="the network reads values of tensors back .* name the cuts"):
        module_flops(net, torch.optim.SGD)


def test_flops_count_what_an_optimizer_multiplies():
    net = LocalSequential(nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 3, bias=False)), Greedy(), 3, (6,))
    plain, muon = module_flops(net, torch.optim.SGD), module_flops(net, torch.optim.Muon)
    assert all(more > less for more, less in zip(muon, plain, strict=True))


def test_flops_name_the_targets_that_a_criterion_does_not_take():
    layers = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    net = LocalSequential(layers, Greedy(), criterion=nn.NLLLoss(), outputs=3, input_shape=(6,))
    with pytest.raises(ValueError, match=r"FLOPs are counted by a step on targets of shape \(2, 3\)"):
        module_flops(net, sgd)


class Clock:
    """A millisecond passes between two readings, and what ``wait`` adds."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        self.seconds += 0.001
        return self.seconds

    def __deepcopy__(self, memo):
        return self

    def wait(self, seconds):
        self.seconds += seconds


class Waiting(nn.Module):
    def __init__(self, clock):
        super().__init__()
        self.clock = clock

    def forward(self, x):
        self.clock.wait(0.02)
        return x + 0 * torch.rand_like(x)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_measured_times_are_those_of_the_modules(accumulate, monkeypatch):
    torch.manual_seed(0)
    clock = Clock()  # the machine's own may be delayed anywhere
    monkeypatch.setattr(time, "perf_counter", clock)
    slow = [nn.ReLU(), Waiting(clock), nn.ReLU()]
    layers = [nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), slow[k]) for k in range(3)]
    net = LocalSequential(nn.Sequential(*layers, nn.Linear(8, 3)), Greedy(), 3, (8,)).eval()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    options = {"autocast": None, "clip_norm": 1.0, "clip": "module", "accumulate": accumulate, "recompute": None}
    times = module_times(net, 4, sgd, params=list(net.parameters()), **options)
    assert len(times) == net.num_modules
    assert times[1] - times[0] == pytest.approx(0.02) and 0 < min(times)
    assert torch.equal(random, torch.get_rng_state()) and not net.training
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(p.grad is None for p in net.parameters())

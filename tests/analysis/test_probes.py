"""Linear probes: what they find, and that they leave everything else alone."""

from __future__ import annotations

import copy
import math
import weakref

import pytest
import torch
from torch import nn

from auglocal_ext import ContSup, LocalSequential, models
from auglocal_ext.analysis import Loaders, linear_probes
from auglocal_ext.analysis.probes import LinearProbe
from auglocal_ext.analysis.readout import train_readouts
from auglocal_ext.layers import Features


def identity(features: int) -> nn.Sequential:
    """Its only layer hands on its input."""
    network = nn.Sequential(nn.Linear(features, features, bias=False), nn.Linear(features, 2))
    with torch.no_grad():
        network[0].weight.copy_(torch.eye(features))
    return network


def loaders(x: torch.Tensor, y: torch.Tensor, size: int = 50) -> Loaders:
    half = len(x) // 2
    cut = [
        list(zip(part.split(size), labels.split(size), strict=True))
        for part, labels in zip(x.split(half), y.split(half), strict=True)
    ]
    return Loaders(*cut)


def corners(count: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    """Points around (+-1, +-1): a linear classifier tells their first sign, and not the product of both."""
    signs = torch.randint(0, 2, (count, 2)) * 2 - 1
    return signs + 0.2 * torch.randn(count, 2), signs


def test_separable_data_and_such_that_no_linear_classifier_tells():
    points, signs = corners()
    # Far from the origin and of unlike scales: standardised, they are as easy.
    (easy, *_) = linear_probes(
        identity(2),
        loaders(points * torch.tensor([1e3, 1e-2]) + 50, (signs[:, 0] > 0).long()),
        2,
        (2,),
        epochs=5,
    )
    assert easy.test_accuracy > 0.99 and easy.train_accuracy > 0.98 and easy.test_loss < 0.2
    (hard, *_) = linear_probes(identity(2), loaders(points, (signs.prod(1) > 0).long()), 2, (2,), epochs=5)
    assert hard.test_loss > 0.67 and hard.test_accuracy < 0.8  # a line has at most three corners on their side


def test_each_layer_has_what_its_network_makes_of_it():
    """The second layer multiplies out what the first cannot show, the third forgets it all."""
    points, signs = corners()
    network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3), nn.Linear(3, 2))
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[1.0, 1], [-1, -1], [1, -1], [-1, 1]]))
        network[0].bias.zero_()
        network[2].weight.zero_()
    source = loaders(points, (signs.prod(1) > 0).long())
    (raw, *_) = linear_probes(identity(2), source, 2, (2,), epochs=5)
    first, second, third = linear_probes(network, source, 2, (2,), epochs=5)
    assert raw.test_accuracy < 0.8 < 0.97 < first.test_accuracy
    assert second.test_accuracy < 0.6 and third.test_accuracy < 0.6
    assert [p.features for p in (first, second, third)] == [4, 3, 2]
    assert [p.name for p in (first, second, third)] == ["0", "2", "3"]


def test_of_maps_at_most_so_many_features():
    x = torch.randn(20, 3, 32, 32)
    source = loaders(x, torch.randint(3, (20,)), 5)
    net = LocalSequential(models.resnet8(num_classes=3), ContSup("R1E"), 3, (3, 32, 32))
    found = linear_probes(net, source, 3, (3, 32, 32), epochs=1)
    assert [p.features for p in found] == [2048, 2048, 2048, 2048, 3]
    assert [p.features for p in linear_probes(net, source, 3, (3, 32, 32), epochs=1, max_features=300)] == [
        256,
        256,
        256,
        256,
        3,
    ]
    assert LinearProbe(Features((700, 3, 3)), 2, 600).features == 700  # channels are never pooled


def test_a_probe_does_not_know_of_the_others():
    points, signs = corners(200)
    source = loaders(points, (signs[:, 0] > 0).long())
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    alone = nn.Sequential(network[0], network[1], nn.Linear(4, 2))
    assert linear_probes(network, source, 2, (2,), epochs=3)[0] == linear_probes(alone, source, 2, (2,), epochs=3)[0]


def test_the_network_and_the_random_state_are_left_as_they_were():
    net = LocalSequential(models.resnet8(width=4), ContSup("R1E"), 10, (3, 16, 16)).train()
    x, y = torch.randn(17, 3, 16, 16), torch.randint(10, (17,))
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    source = Loaders([(x[:16], y[:16]), (x[16:], y[16:])], [(x, y)])  # the last batch is a single image
    found = linear_probes(net, source, 10, (3, 16, 16), epochs=2)
    assert all(torch.isfinite(torch.tensor([p.test_loss, p.train_accuracy])).all() for p in found)
    assert torch.equal(torch.get_rng_state(), state)
    assert net.training and all(p.grad is None for p in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert linear_probes(net, source, 10, (3, 16, 16), epochs=2) == found


def test_batches_are_let_go_of():
    alive: list[weakref.ref] = []

    class Stream:
        steps = 6

        def train(self, epoch):
            for _ in range(self.steps):
                # This one is not made yet, and of those before the loop holds the last.
                assert sum(reference() is not None for reference in alive) <= 1
                x = torch.randn(8, 3, 16, 16)
                alive.append(weakref.ref(x))
                yield x, torch.randint(10, (8,))
                del x

        def test(self):
            yield torch.randn(8, 3, 16, 16), torch.randint(10, (8,))

    linear_probes(models.resnet8(width=4), Stream(), 10, (3, 16, 16), epochs=2)
    assert len(alive) == 12


def test_rates_are_the_readouts_own_and_fall_as_a_cosine():
    used: dict[str, list[float]] = {}

    class Watched(LinearProbe):
        def optimizer(self, lr):
            made = super().optimizer(lr)
            made.register_step_pre_hook(
                lambda optimizer, *_: used.setdefault(str(self.features), []).append(optimizer.param_groups[0]["lr"])
            )
            return made

    network = nn.Sequential(nn.Linear(2, 16), nn.Linear(16, 4), nn.Linear(4, 2))
    source = loaders(torch.randn(8, 2), torch.zeros(8).long(), 2)
    options = {"epochs": 2, "lr": 0.3, "seed": 0, "label": "", "bars": False}
    train_readouts(network, lambda read: Watched(read, 2, 2048), source, (2,), **options)
    falling = [(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert used["16"] == pytest.approx([0.3 / 4 * part for part in falling])
    assert used["4"] == pytest.approx([0.3 / 2 * part for part in falling])


def test_errors():
    source = loaders(torch.randn(8, 2), torch.zeros(8).long(), 4)
    with pytest.raises(ValueError, match="epochs must be at least 1, got 0"):
        linear_probes(identity(2), source, 2, (2,), epochs=0)
    with pytest.raises(ValueError, match="no training batch"):
        linear_probes(identity(2), Loaders([], [(torch.randn(2, 2), torch.zeros(2).long())]), 2, (2,))
    with pytest.raises((ValueError, IndexError), match="label"):
        linear_probes(identity(2), loaders(torch.randn(8, 2), torch.full((8,), 5), 4), 2, (2,))


@pytest.mark.gpu
def test_on_a_gpu():
    x, y = torch.randn(64, 3, 16, 16), torch.randint(4, (64,))
    x[torch.arange(64), :, 0, 0] += 9 * (y - 1.5)[:, None]
    source = Loaders(list(zip(x.split(16), y.split(16), strict=True)), [(x, y)])
    net = LocalSequential(models.resnet8(num_classes=4, width=4), ContSup("R1E"), 4, (3, 16, 16))
    on_cpu = linear_probes(net, source, 4, (3, 16, 16), epochs=3)
    state = torch.cuda.get_rng_state()
    for here, there in zip(on_cpu, linear_probes(net.cuda(), source, 4, (3, 16, 16), epochs=3), strict=True):
        assert there.test_loss == pytest.approx(here.test_loss, rel=0.02)
    assert torch.equal(torch.cuda.get_rng_state(), state)

"""docs/differences.md: what it says of this library holds, and the options that it names exist."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import auglocal_ext
from auglocal_ext import DGL, MAN, AugLocal, ContSup, Greedy, InfoPro, LocalSequential, PredSim, models, rules
from auglocal_ext.ops.supervised_contrast import supervised_contrast
from auglocal_ext.rules import INFOPRO_WEIGHTS, PredictionHead

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "differences.md").read_text()
WEIGHTS = ((1.0, 1.0), (1.0, 1.0))


def wrap(rule, modules=None, **options):
    return LocalSequential(models.resnet_cifar(14, width=4), rule, 10, (3, 16, 16), modules=modules, **options)


def convolutions(module):
    return [part for part in module.modules() if isinstance(part, nn.Conv2d)]


def test_options_that_it_names_exist():
    options = {each.name for rule in rules.RULES.values() for each in dataclasses.fields(rule)}
    options |= set(inspect.signature(LocalSequential).parameters)
    last = [line.strip("|").split("|")[-1] for line in PAGE.splitlines() if line.startswith("| ")]
    assert set(re.findall(r"`(\w+)=", " ".join(last))) <= options
    known = vars(rules) | vars(auglocal_ext) | {"first": (1, 1), "last": (1, 1), "factory": lambda *_: None}
    calls = [code for cell in last for code in re.findall(r"`(?:head=)?([A-Z]\w+\(.*?\))`", cell)]
    assert len(calls) > 7
    for call in calls:
        eval(call, dict(known))


def test_contrast_is_divided_by_the_samples_that_have_a_positive():
    z = F.normalize(torch.randn(4, 8, dtype=torch.float64))
    similar = (z @ z.t() / 0.07).fill_diagonal_(-torch.inf)
    log_p = similar - similar.logsumexp(1, keepdim=True)
    loss = -(log_p[0, 1] + log_p[1, 0])  # of the labels below only 0 comes twice
    torch.testing.assert_close(supervised_contrast(z, torch.tensor([0, 0, 1, 2]), 0.07, -100), loss / 2)


def test_one_module_in_bfloat16_has_a_float32_loss():
    net = LocalSequential(models.resnet_cifar(8, width=4).bfloat16(), Greedy(), 10, (3, 16, 16), modules=1, fused=False)
    x, y = torch.randn(4, 3, 16, 16).bfloat16(), torch.randint(0, 10, (4,))
    assert net(x, y).loss.dtype == torch.float32 and F.cross_entropy(net.primary(x), y).dtype == torch.bfloat16


def test_initial_values():
    net = wrap(ContSup("R1E", head=InfoPro(*WEIGHTS)))
    biases = [part.bias for part in convolutions(nn.ModuleList([net.auxiliary, net.context])) if part.bias is not None]
    assert len(biases) > 10 and not any(bias.any() for bias in biases)
    torch.manual_seed(0)
    net = LocalSequential(models.resnet_cifar(8, width=32), PredSim(), 10, (3, 16, 16))
    linear = net.auxiliary[0].network.head.linear
    assert not linear.weight.any() and not linear.bias.any() and net.primary.classifier.fc.weight.any()
    std = net.auxiliary[0].terms[0].encoder.weight.std().item()
    assert std == pytest.approx(1 / math.sqrt(3 * 9 * 32), rel=0.05)  # torch's default, not sqrt(2 / (9 * 32))
    net = LocalSequential(models.resnet_cifar(8, width=32), DGL(), 10, (3, 16, 16))
    assert convolutions(net.auxiliary[0])[0].weight.std().item() == pytest.approx(math.sqrt(2 / 32), rel=0.1)
    net = wrap(MAN())
    for copied in (net.auxiliary[0].trained, net.auxiliary[0].average):
        assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), net.primary[1].parameters(), strict=True))


def test_auglocals_batch_norm():
    def norms(rule):
        return sum(isinstance(part, nn.BatchNorm1d) for part in wrap(rule).auxiliary[0].modules())

    found = [norms(rule) for rule in (AugLocal(1), AugLocal(2), AugLocal(3), AugLocal(2, single_layer_norm=False))]
    assert found == [0, 1, 0, 0]
    assert norms(AugLocal(1, single_layer_norm=True)) == 1 and norms(AugLocal(1, head=rules.LinearHead(norm=True))) == 1
    assert [len(wrap(AugLocal(1, pyramid=slope)).auxiliary[0].blocks) for slope in (0.0, 1.0)] == [0, 0]


def test_counts_and_weights():
    with torch.device("meta"):
        net = LocalSequential(models.resnet32(), DGL(), 10, (3, 32, 32))
        assert LocalSequential(models.resnet32(), Greedy(), 10, (3, 32, 32), modules=[*range(1, 15)]).num_modules == 15
    ours, network = (sum(p.numel() for p in part.parameters()) for part in (net, net.primary))
    theirs = network
    for c in [16] * 6 + [32] * 5 + [64] * 4:
        theirs += 3 * (c * c + 2 * c) + 2 * (16 * c * c + 8 * c) + 4 * c * 10 + 10
    assert (ours, theirs) == (1_684_080, 1_305_200) and f"{ours:,}" in PAGE and f"{theirs:,}" in PAGE
    assert INFOPRO_WEIGHTS["svhn", "resnet110"][4][1] == (0.5, 1)
    assert INFOPRO_WEIGHTS["cifar10", "resnet110, balanced"][4][1] == (5, 0.1)
    net = wrap(ContSup("R1E"))
    assert len(net.context["1"].inputs) == 0 and len(net.context["2"].inputs) == 1 and not wrap(ContSup("R0")).context


def test_losses_of_weight_0():
    first, *_ = wrap(InfoPro((0.0, 1.0), (0.0, 1.0))).auxiliary
    assert len(first.terms) == 0
    first, *_ = wrap(InfoPro((1.0, 0.0), (1.0, 0.0))).auxiliary
    assert not any(p.requires_grad for p in first.network.parameters())


@pytest.mark.parametrize(("channels", "size", "kernel", "same"), [(16, 32, (4, 2), True), (64, 24, (16, 8), False)])
def test_predsims_pooling(channels, size, kernel, same):
    limit = 512 if size == 24 else 2048
    head = PredictionHead(limit)
    net = LocalSequential(
        nn.Sequential(nn.Conv2d(3, channels, 1), nn.Conv2d(channels, 8, 1), nn.Flatten(), nn.Linear(8 * size**2, 10)),
        Greedy(head),
        10,
        (3, size, size),
    )
    h = torch.rand(2, channels, size, size)
    padding = tuple(k * (-(-size // k) - size // k) // 2 for k in kernel)
    theirs = F.avg_pool2d(h, kernel, padding=padding).flatten(1)
    ours = net.auxiliary[0].head.features(h)
    assert ours.shape == theirs.shape and torch.allclose(ours, theirs) == same


def test_dropout_and_pooling_belong_to_the_layer_before_them():
    parts = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3), nn.Flatten()]
    net = LocalSequential(nn.Sequential(*parts, nn.Linear(16, 5)), PredSim(), 5, (3, 8, 8), fused=False)
    assert [type(layer).__name__ for layer in net.local_modules[0].layers] == ["Conv2d", "ReLU", "Dropout", "MaxPool2d"]

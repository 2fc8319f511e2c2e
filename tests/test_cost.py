"""Parameters, multiply-accumulates and floating-point operations against counts made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext import AugLocal, ContSup, Greedy, InfoPro, LocalSequential, models
from auglocal_ext.cost import count_flops, count_macs, count_parameters, count_training_macs


def small():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 2, 2, stride=2),
        nn.Flatten(),
        nn.Linear(2 * 8 * 8, 5),
    )


def test_parameters():
    net = small()
    every = (8 * 2 * 9 + 8) + (8 + 8) + (8 * 2 * 4 + 2) + (128 * 5 + 5)
    assert count_parameters(net) == count_parameters(net, inference=True) == every
    net[0].weight.requires_grad_(False)
    assert count_parameters(net) == every - 8 * 2 * 9
    assert count_parameters(net, inference=True) == every
    shared = nn.Linear(3, 3)
    assert count_parameters(nn.ModuleList([shared, shared])) == 12


@pytest.mark.parametrize(("rule", "extra"), [(AugLocal(depth=2), 0), (ContSup(context="E"), 3912)])
def test_deployed_parameters_are_those_of_the_export(rule, extra):
    primary = models.build("resnet32")
    net = LocalSequential(primary, rule, num_classes=10, input_shape=(3, 32, 32), modules=2)
    deployed = count_parameters(net, inference=True)
    assert deployed == sum(p.numel() for p in net.export().parameters()) == 466_906 + extra
    assert count_parameters(net) > deployed


def test_macs_by_hand_and_nothing_is_touched():
    net = small()
    state = {key: value.clone() for key, value in net.state_dict().items()}
    assert count_macs(net, (4, 4, 4)) == 16 * 8 * 2 * 9 + 16 * 8 * 2 * 4 + 128 * 5
    assert net.training and all(not module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    with pytest.raises(ValueError, match="positive"):
        count_macs(net, (4, 0, 4))


def test_macs_of_a_layer_count_per_call():
    layer = nn.Linear(6, 6)
    assert count_macs(nn.Sequential(layer, layer), (6,)) == 2 * 36


@pytest.mark.parametrize(
    ("name", "parameters", "macs"), [("resnet32", 466_906, 69.12e6), ("resnet110", 1_730_714, 253.15e6)]
)
def test_cifar_networks_cost_what_the_papers_code_counts(name, parameters, macs):
    with FakeTensorMode():
        net = models.build(name)
    assert count_parameters(net) == parameters
    assert count_macs(net, models.input_shape(name)) == pytest.approx(macs, rel=1e-4)


# Forward of a training step over that of backpropagation, 16 local modules, as counted in ContSup's released code.
DECODER = InfoPro((5, 0.05), (0.2, 0.5))
TRAINING_FORWARD = {
    "R0": (ContSup("R0"), 1.33, 1.09),
    "R1": (ContSup("R1"), 1.39, 1.11),
    "E": (ContSup("E"), 2.22, 1.33),
    "R1E": (ContSup("R1E"), 2.28, 1.35),
    "InfoPro": (DECODER, 2.22, 1.33),
    "R1E+decoder": (ContSup("R1E", head=DECODER), 3.17, 1.59),
}


@pytest.mark.parametrize("name", ["resnet32", pytest.param("resnet110", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] if c in ("R0", "R1", "E") else []) for c in TRAINING_FORWARD]
)  # the three are parts of R1E
def test_training_forward_costs_the_published_share(case, name):
    rule, *expected = TRAINING_FORWARD[case]
    with FakeTensorMode():
        net = LocalSequential(models.build(name), rule, 10, (3, 32, 32), modules=16)
        backbone = count_macs(net.primary, (3, 32, 32))
        found = count_training_macs(net, (3, 32, 32)) / backbone
    assert found == pytest.approx(expected[name == "resnet110"], abs=0.0051)


@pytest.mark.parametrize("fused", [True, False])
def test_training_macs_by_hand_and_nothing_is_touched(fused):
    layers = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    net = LocalSequential(layers, Greedy(), 5, (3, 6, 6), fused=fused)
    state = {key: value.clone() for key, value in net.state_dict().items()}
    primary = 36 * 3 * 4 * 9 + 36 * 4 * 8 * 9 + 8 * 5
    assert count_macs(net, (3, 6, 6)) == primary
    assert count_training_macs(net, (3, 6, 6)) == primary + 4 * 5
    assert net.training and all(p.grad is None for p in net.parameters())
    assert all(not module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_flops_of_a_step():
    def step():
        net = nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False))
        net(torch.ones(4, 16)).sum().backward()

    # forward, gradients of both weights, and of the second layer's input alone
    assert count_flops(step) == 2 * 4 * (16 * 32 * 2 + 32 * 8 * 3)
    with FakeTensorMode():
        assert count_flops(step) == 2 * 4 * (16 * 32 * 2 + 32 * 8 * 3)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d])
def test_each_pass_of_a_convolution_in_groups_costs_the_same(kind, groups):
    def step(frozen=False):
        layer = kind(8, 8, 3, 2, groups=groups)
        layer.weight.requires_grad_(not frozen)
        x = torch.ones(2, 8, *[9] * (1 if kind is nn.Conv1d else 2), requires_grad=True)
        layer(x).sum().backward()

    once = count_flops(
        lambda: kind(8, 8, 3, 2, groups=groups)(torch.ones(2, 8, *[9] * (1 if kind is nn.Conv1d else 2)))
    )
    positions = {nn.Conv1d: 4, nn.Conv2d: 16, nn.ConvTranspose2d: 81}[kind]
    taps = 3 if kind is nn.Conv1d else 9
    assert once == 2 * 2 * positions * taps * 8 * 8 // groups
    assert count_flops(step) == 3 * once and count_flops(lambda: step(frozen=True)) == 2 * once


def test_matrix_products_inside_of_ops_are_counted():
    """As those of the eager formulas: logits and their two gradients, pairs and theirs (one by symmetry)."""
    from torch.utils.flop_counter import FlopCounterMode

    from auglocal_ext.ops import pooled_cross_entropy, similarity_loss, supervised_contrast

    def counted(run):
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    x, weight = torch.randn(6, 5, 4, 4, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    target = torch.tensor([0, 1, 2, 0, 1, 2])
    assert counted(lambda: pooled_cross_entropy(x, weight, None, target).loss.backward()) == 3 * 2 * 6 * 5 * 3
    assert counted(lambda: pooled_cross_entropy(x.detach(), weight, None, target).loss.backward()) == 2 * 2 * 6 * 5 * 3
    assert counted(lambda: similarity_loss(x, target, 3).backward()) == 2 * 2 * 6 * 6 * 5
    features = torch.randn(6, 5, requires_grad=True)
    assert counted(lambda: supervised_contrast(features, target, 0.07).backward()) == 3 * 2 * 6 * 6 * 5
    with torch.no_grad():
        assert counted(lambda: supervised_contrast(features, target, 0.07)) == 2 * 6 * 6 * 5

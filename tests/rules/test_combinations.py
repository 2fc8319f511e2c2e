"""Rules and heads together: what is handed through, what is refused because nothing would read or honour it."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from auglocal_ext import MAN, AugLocal, ContSup, Greedy, InfoPro, LocalSequential, LocalStep, PredSim, models
from auglocal_ext.auxiliary import Auxiliary, AuxiliaryNetwork, Objectives, Term
from auglocal_ext.planning import MemoryBudgetError, plan_memory
from auglocal_ext.rules import ConvHead, LinearHead, Rule

WEIGHTS = ((5.0, 0.5), (0.5, 1.0))


def network(rule, modules=None, **options):
    torch.manual_seed(3)
    return LocalSequential(models.resnet_cifar(14, width=4), rule, 10, (3, 16, 16), modules=modules, **options)


def batch(n=6):
    generator = torch.Generator().manual_seed(5)
    return torch.rand(n, 3, 16, 16, generator=generator), torch.randint(0, 10, (n,), generator=generator)


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


# Heads


@pytest.mark.parametrize("head", [MAN(), AugLocal(2), Greedy(MAN()), InfoPro(*WEIGHTS, head=AugLocal(2))], ids=repr)
def test_no_later_layers_are_behind_sampled_ones(head):
    with pytest.raises(ValueError, match="after sampled layers there are none. Make it the outer rule, or raise depth"):
        AugLocal(3, head=head)


def test_the_layer_after_next_may_not_be_there():
    with pytest.raises(ValueError, match="MAN copies the next layer.*its head the one after that.*none after layer 6"):
        network(MAN(head=MAN()))
    assert network(MAN(head=AugLocal(2, joint_tail=False))).num_modules == 7


@dataclass(frozen=True)
class Zeroed(LinearHead):
    """A head of one's own."""

    def build_auxiliary(self, network, module):
        made = super().build_auxiliary(network, module)
        nn.init.zeros_(made.head.linear.weight)
        return made


@pytest.mark.parametrize("rule", [Greedy(Zeroed()), AugLocal(2, head=Zeroed()), MAN(head=Zeroed())], ids=repr)
def test_a_head_of_ones_own_is_the_one_that_is_built(rule):
    for auxiliary in network(rule).auxiliary:
        linear = [m for m in auxiliary.modules() if isinstance(m, nn.Linear)][-1]
        assert not linear.weight.any()


def test_a_norm_is_asked_for_once():
    with pytest.raises(ValueError, match="single_layer_norm=False leaves out the BatchNorm that head=LinearHead"):
        AugLocal(2, head=LinearHead(norm=True), single_layer_norm=False)
    with pytest.raises(ValueError, match="single_layer_norm puts a BatchNorm.*has no such place"):
        AugLocal(2, head=Zeroed(), single_layer_norm=True)


def test_options_that_nothing_reads():
    for options in (
        {"head": "0c1f", "widen": 2},
        {"head": "0c1f", "feature_dim": 64},
        {"head": "1c1f", "feature_dim": 9},
    ):
        with pytest.raises(ValueError, match="is read by nothing here: head '.c1f' has no layers of such a width"):
            ContSup("R0", **options)
    wide = network(ContSup("E", head="0c1f", widen=2))  # the encoders read it
    assert wide.context["1"].image.encoder[0].out_channels == 24
    for rule in (ContSup("E", widen=0.05), ContSup("R0", head=ConvHead("1c2f", widen=0.001))):
        with pytest.raises(ValueError, match="widen=.* leaves none of .* channels"):
            network(rule)
    with pytest.raises(ValueError, match="--weights are four numbers.*got none"):
        InfoPro.of_options({}, (0.5,) * 3, (0.5,) * 3)


# What follows a step


class Counting(Auxiliary):
    can_recompute = True

    def __init__(self, inner):
        super().__init__(inner.settings)
        self.inner = inner
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, h):
        return self.inner(h)

    def loss(self, h, context):
        return self.inner.loss(h, context)

    def after_step(self):
        self.steps += 1


class CountingTerm(Term):
    can_recompute = True

    def __init__(self, settings):
        super().__init__(settings)
        self.register_buffer("steps", torch.zeros(()))

    def loss(self, h, context):
        return h.square().mean()

    def after_step(self):
        self.steps += 1


class Counted(Rule):
    """A counting network behind blocks and beside terms, which hand each step on."""

    def build_auxiliary(self, network, module):
        head = Counting(LinearHead().build_auxiliary(network, module))
        term = CountingTerm(network.settings(module))
        return Objectives(AuxiliaryNetwork(nn.Sequential(), head), 1.0, [(0.5, term)])


def test_every_part_hears_of_a_step():
    net = network(Counted())
    step = LocalStep(net, sgd)
    for _ in range(3):
        step(*batch())
    counters = [part for part in net.auxiliary.modules() if isinstance(part, Counting | CountingTerm)]
    assert len(counters) == 12 and all(int(part.steps) == 3 for part in counters)
    nested = network(InfoPro(*WEIGHTS, head=MAN(0.0)))
    for parameter in nested.primary.parameters():
        nn.init.constant_(parameter, 0.25)
    nested(*batch())
    assert all(p.eq(0.25).all() for a in nested.auxiliary for p in a.network.average.parameters())


# Recomputation


def test_each_module_is_built_with_its_own_recomputation():
    chosen = ["none", "auxiliary", "all", 1, "auxiliary", "none", "none"]
    net = network(Greedy("1c2f"), recompute=chosen)
    assert [a.settings.recompute for a in net.auxiliary] == [choice in ("auxiliary", "all") for choice in chosen[:-1]]
    net.recompute = "auxiliary"
    assert net.network.recompute == (True,) * 7 and net.network.settings(0).recompute


class Plain(Auxiliary):
    """It says nothing of recomputation."""

    def __init__(self, settings, width):
        super().__init__(settings)
        self.linear = nn.Linear(width, settings.task.outputs)

    def forward(self, h):
        return self.linear(h.mean((2, 3)))

    def loss(self, h, context):
        return self.settings.task.score(self(h), context.target)


class Mixed(Rule):
    """Every other module's network cannot recompute."""

    def build_auxiliary(self, network, module):
        if module % 2:
            return LinearHead().build_auxiliary(network, module)
        return Plain(network.settings(module), network.features(module).channels)


def test_plans_choose_among_what_each_module_can_do():
    net = network(Mixed())
    assert net.recompute_ways == (*(("none", 1), ("none", "auxiliary", "all", 1)) * 3, ("none", "auxiliary", "all"))
    plan = plan_memory(net, 64, sgd)
    assert plan.recompute == ("none",) * 7 and "-" in str(plan)
    lowest = plan_memory(net, 64, sgd, recompute="peak")
    assert not {"auxiliary", "all"} & set(lowest.recompute[0:6:2]) and lowest.predicted_bytes <= plan.predicted_bytes
    with pytest.raises(MemoryBudgetError):
        plan_memory(net, 64, sgd, memory_budget=plan.base_bytes)
    with pytest.raises(ValueError, match="Plain cannot recompute"):
        plan_memory(net, 64, sgd, recompute="all")
    step = LocalStep(net, sgd, plan=lowest)
    assert step(*batch(4)).loss.isfinite()


# MAN's copies


@pytest.mark.parametrize(
    ("tail", "kept"),
    [
        (lambda: [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(16)], ["Conv2d", "ReLU"]),
        (lambda: [nn.AvgPool2d(8), nn.BatchNorm2d(16), nn.Flatten()], ["Conv2d", "ReLU"]),
        (
            lambda: [nn.MaxPool2d(2), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
            ["Conv2d", "ReLU", "MaxPool2d", "BatchNorm2d"],
        ),
    ],
)
def test_a_norm_of_what_is_pooled_belongs_to_the_tail(tail, kept):
    layers = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
        *(*tail(), nn.Linear(16, 10)),
    )
    net = LocalSequential(layers, MAN(), 10, (3, 16, 16), fused=False)
    assert [type(m).__name__ for m in net.auxiliary[0].trained.modules() if not list(m.children())] == kept
    net(*batch()).loss.backward()


def test_an_average_follows_the_layers_it_was_built_of():
    net = network(MAN())
    net(*batch())
    twin = copy.deepcopy(net)
    twin(*batch())
    net.primary[1] = copy.deepcopy(net.primary[1])
    with pytest.raises(RuntimeError, match="a layer was put in the place of another.*MAN.*wrap the network again"):
        net(*batch())
    other = network(Greedy())
    other.primary[1] = copy.deepcopy(other.primary[1])
    other(*batch())


def test_an_average_that_would_stand_still():
    layers = models.resnet_cifar(8, width=4).to(torch.bfloat16)
    with pytest.raises(
        ValueError, match="moves its average by 0.005 of a difference, which torch.bfloat16 rounds away"
    ):
        LocalSequential(layers, MAN(), 10, (3, 16, 16))
    LocalSequential(layers, MAN(0.5), 10, (3, 16, 16))
    net = network(MAN()).bfloat16()
    with pytest.raises(ValueError, match="Keep float32 parameters and use torch.autocast"):
        net(batch()[0].bfloat16(), batch()[1])


# State


@pytest.mark.parametrize(
    "rule", [PredSim(), InfoPro(*WEIGHTS, head=InfoPro(*WEIGHTS))], ids=["predsim", "infopro twice"]
)
def test_state_that_was_saved_before_tasks_were_parts_is_loaded(rule):
    net = network(rule)
    old = {key.replace(".network.", ".task."): value for key, value in net.state_dict().items()}
    assert old.keys() != net.state_dict().keys()
    network(rule).load_state_dict(old)

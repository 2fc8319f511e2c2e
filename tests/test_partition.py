"""Where a network is cut."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from auglocal_ext import Balanced, ContSup, Greedy, LocalSequential, PredSim, models
from auglocal_ext.partition import CONTSUP_BALANCED, balance, cut_points
from auglocal_ext.step.module_costs import module_flops

# [stage, block] after which a module ends, ContSup's "equal layers" partitions; a stage has 5 or 18 blocks.
EQUAL_RESNET32 = {
    2: [(2, 1)],
    3: [(1, 4), (2, 4)],
    4: [(1, 2), (2, 1), (3, 0)],
    8: [(1, 0), (1, 2), (1, 4), (2, 1), (2, 3), (3, 0), (3, 2)],
    16: [(0, 0)] + [(s, b) for s in (1, 2, 3) for b in range(5)][:-1],
}
EQUAL_RESNET110 = {
    2: [(2, 8)],
    3: [(1, 17), (2, 17)],
    4: [(1, 11), (2, 7), (3, 3)],
    8: [(1, 4), (1, 11), (2, 0), (2, 7), (2, 14), (3, 3), (3, 10)],
    16: [
        (1, 1),
        (1, 4),
        (1, 7),
        (1, 10),
        (1, 13),
        (1, 16),
        (2, 1),
        (2, 4),
        (2, 7),
        (2, 11),
        (2, 15),
        (3, 1),
        (3, 5),
        (3, 9),
        (3, 13),
    ],
}
BALANCED_RESNET110 = {2: [(1, 14)], 3: [(1, 9), (2, 2)], 4: [(1, 6), (1, 14), (2, 8)]}
BALANCED_RESNET32 = {
    2: [(1, 3)],
    4: [(1, 2), (1, 4), (2, 2)],
    8: [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2), (3, 1), (3, 2)],
}


def layer_index(stage, block, per_stage):
    return 0 if stage == 0 else 1 + (stage - 1) * per_stage + block


@pytest.mark.parametrize(("table", "per_stage"), [(EQUAL_RESNET32, 5), (EQUAL_RESNET110, 18)])
def test_equal_partition_is_the_published_one(table, per_stage):
    total = 3 * per_stage + 1
    for k, boundaries in table.items():
        expected = [layer_index(s, b, per_stage) for s, b in boundaries] + [total - 1]
        assert list(cut_points(total, k)) == expected, k


@pytest.mark.parametrize(("table", "per_stage"), [(BALANCED_RESNET32, 5), (BALANCED_RESNET110, 18)])
def test_published_balanced_partitions(table, per_stage):
    total = 3 * per_stage + 1
    for k, boundaries in table.items():
        assert list(CONTSUP_BALANCED[total, k]) == [layer_index(s, b, per_stage) for s, b in boundaries]
        assert cut_points(total, CONTSUP_BALANCED[total, k])[-1] == total - 1


@pytest.mark.parametrize(
    ("modules", "error", "message"),
    [
        (17, ValueError, "modules=17: the network has 16 layers"),
        (0, ValueError, "choose 1 .. 16"),
        ([3, 3], ValueError, "ascending"),
        ([15], ValueError, "within 0 .. 14"),
        ("4", TypeError, "modules must be None"),
        (2.5, TypeError, "modules must be None"),
    ],
)
def test_wrong_cuts(modules, error, message):
    with pytest.raises(error, match=message):
        cut_points(16, modules)


def test_balance_is_optimal():
    """Against an exhaustive search over all partitions."""
    generator = torch.Generator().manual_seed(1)
    for total, k in itertools.product((5, 7), (1, 2, 3, 5)):
        cost, head, context = (torch.randint(0, 50, (total,), generator=generator).tolist() for _ in range(3))
        head[-1] = context[0] = 0

        def peak(ends, cost=cost, head=head, context=context):
            first, worst = 0, 0
            for end in ends:
                worst = max(worst, sum(cost[first : end + 1]) + head[end] + context[first])
                first = end + 1
            return worst

        found = balance(total, k, cost, head, context)
        best = min(peak((*cuts, total - 1)) for cuts in itertools.combinations(range(total - 1), k - 1))
        assert len(found) == k and peak(found) == best


def test_balanced_modules_touch_no_weight_and_flatten_the_peak():
    layers = models.resnet_cifar(20)
    before = {k: v.clone() for k, v in layers.state_dict().items()}
    net = LocalSequential(layers, ContSup("E"), 10, (3, 32, 32), modules=Balanced(3))
    assert net.num_modules == 3
    # Maps of the first stage are larger, so balanced modules are shorter there.
    sizes = [b - a for a, b in zip((-1, *net.network.ends), net.network.ends, strict=False)]
    assert sizes[0] < sizes[-1]
    for key, value in layers.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("rule", [pytest.param(ContSup("R1E"), marks=pytest.mark.slow), PredSim()], ids=repr)
def test_balanced_flops_are_those_of_a_training_step(rule):
    """No other cuts have a costliest module that computes less, by the count of the step itself."""

    def costliest(modules):
        net = LocalSequential(models.resnet_cifar(14, width=4), rule, 10, (3, 16, 16), modules=modules)
        return max(module_flops(net, lambda params: torch.optim.SGD(params, lr=0.1))), net.network.ends

    layers = models.resnet_cifar(14, width=4)
    before = copy.deepcopy(layers.state_dict())
    found, ends = costliest(Balanced(2, by="flops"))
    assert len(ends) == 2
    best = min(costliest(cuts)[0] for cuts in itertools.combinations(range(ends[-1]), 1))
    # Which inputs ContSup's context encodes depends on the other cuts.
    assert found == best or isinstance(rule, ContSup) and found < 1.01 * best
    net = LocalSequential(layers, rule, 10, (3, 16, 16), modules=Balanced(2, by="flops"))
    assert net.network.ends == ends
    for key, value in layers.state_dict().items():
        assert torch.equal(value, before[key]), key


def small_convolutions():
    layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    layers[0].unused = nn.Parameter(torch.zeros(1))  # has no gradient
    return nn.Sequential(
        *layers, nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)
    )


def test_what_is_balanced(monkeypatch):
    """Costs of layers, heads and contexts, counted by hand."""
    found = []

    def kept(total, k, *costs):
        found[:] = costs
        return balance(total, k, *costs)

    monkeypatch.setattr("auglocal_ext.rules.balance.balance", kept)

    def costs(rule, by):
        LocalSequential(small_convolutions(), rule, 10, (3, 8, 8), modules=Balanced(2, by=by))
        return found

    # Bytes of an image in float32. A layer keeps its input and its map, the last one pooled features too; a head keeps
    # pooled features; a context its own map, and statistics.
    layers, heads = [4 * (192 + 256), 4 * (256 + 256), 4 * (256 + 96 + 6)], [4 * 4, 4 * 4, 0]
    assert costs(Greedy(), "memory") == [layers, heads, [0, 0, 0]]
    supplied = costs(ContSup("R1", head="linear"), "memory")
    assert supplied[:2] == [layers, heads]
    assert supplied[2] == pytest.approx([0, 4 * 256, 4 * 256], rel=0.05)

    # FLOPs of two images, 4 per multiply-accumulate: of the output, and again of each gradient.
    first, second, third = 4 * 27 * 4 * 64, 4 * 36 * 4 * 64, 4 * 36 * 6 * 16
    layers, heads = [2 * first, 3 * second, 3 * (third + 4 * 60)], [3 * 4 * 40, 3 * 4 * 40, 0]
    assert costs(Greedy(), "flops") == [layers, heads, [0, -second, -third]]  # no gradient leaves a module
    contexts = [0, 2 * 4 * 3 * 4 * 64, 2 * 4 * 4 * 4 * 64]
    assert costs(ContSup("R1", head="linear"), "flops") == [layers, heads, contexts]


def test_balanced_says_what_it_cannot_balance():
    with pytest.raises(ValueError, match="by is one of memory, flops, time; got 'bytes'"):
        Balanced(3, by="bytes")

    def ends(balanced):
        layers = models.resnet_cifar(14, width=4)
        return LocalSequential(layers, Greedy(), 10, (3, 16, 16), modules=balanced).network.ends

    assert ends(Balanced(3)) == ends(Balanced(3, by="memory")) != ends(Balanced(3, by="flops"))
    with pytest.raises(ValueError, match="needs the number of local modules"):
        ends(Balanced(by="flops"))
    with pytest.raises(ValueError, match="time.* is for stages, .*Take by=.flops"):
        ends(Balanced(2, by="time", batch_size=4))
    for size in (None, 0, True, "4"):
        with pytest.raises(ValueError, match=f"measures steps on .* pass batch_size=, at least 1; got {size!r}"):
            Balanced(2, by="time", batch_size=size)
    with pytest.raises(ValueError, match='batch_size is for Balanced.by="time".; leave it out with by=.flops'):
        Balanced(2, by="flops", batch_size=4)

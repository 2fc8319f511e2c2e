"""What every number of recomputed layers costs, from few runs: equal to a run of each, and the choice to the best."""

from __future__ import annotations

import itertools

import pytest
import torch
from test_plan import BATCH, estimate, metered, sgd, wrap
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext import AugLocal, ContSup, Greedy, LanguageModelling, LocalSequential, localize, models
from auglocal_ext.planning import MemoryBudgetError, plan_memory
from auglocal_ext.planning.estimate import ModuleCost
from auglocal_ext.planning.ways import MeasuredWays, _numbers_to_run, alike_runs
from auglocal_ext.step import LocalStep


def decoder(layers, modules, rule, context=16):
    network = models.gpt(layers, 16, 2, 64, context)
    example = torch.zeros(1, context, dtype=torch.long)
    return LocalSequential(network, rule, modules=modules, task=LanguageModelling(64), example_input=example)


def chain(pairs):
    """Convolutions whose norms and activations begin the next layer, so that fused units reach over two layers."""
    layers = [nn.Conv2d(3, 8, 3, padding=1)]
    for _ in range(pairs):
        layers.append(nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


CASES = {
    "resnet": (lambda: wrap(Greedy(), 32, 4, modules=1), 15, 4),
    "gpt": (lambda: decoder(7, 1, Greedy()), 7, 5),
    "gpt with heads": (lambda: decoder(11, 2, AugLocal(2)), 6, 2),
    "vit": (lambda: LocalSequential(models.vit(7, 16, 2, 8, 32, 10), Greedy(), 10, (3, 32, 32), 1), 7, 8),
    "context": (lambda: LocalSequential(models.resnet_cifar(38, width=4), ContSup("R1E"), 10, (3, 32, 32), 2), 10, 8),
    "chain": (lambda: LocalSequential(chain(9), Greedy(), 10, (3, 32, 32), 1), 9, 64),
}


@pytest.mark.parametrize(
    "case", ["chain", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "chain")]
)
def test_few_runs_show_what_a_run_of_each_number_costs(case):
    make, most, batch = CASES[case]
    with FakeTensorMode():
        net = make()
    planned = estimate(net, batch)
    measured = MeasuredWays(planned, net.recompute_ways)
    measured.run_numbers()
    numbers = max(way for ways in net.recompute_ways for way in ways if isinstance(way, int))
    assert numbers == most
    # Lean blocks with heads: the measured peaks lie on no convex line, so every number runs.
    assert measured.runs <= 3 + most if case == "gpt with heads" else measured.runs < 3 + most
    for n in range(1, most + 1):
        ways = [n if n in ways else "none" for ways in net.recompute_ways]
        for way, module, known in zip(ways, planned.cost(ways).modules, measured.modules, strict=True):
            assert known[way] == module, (n, way)
    assert [list(known) for known in measured.modules] == [list(ways) for ways in net.recompute_ways]


def numbers_run(added, flops):
    costs = {n: ModuleCost(100, a, 0, f) for n, (a, f) in enumerate(zip(added, flops, strict=True), 1)}
    known, ran = {}, []
    for n in _numbers_to_run(known, list(costs), [range(1, len(costs) + 1)]):
        ran.append(n)
        known[n] = costs[n]
    assert known == costs
    return len(ran)


def test_lines_are_found_between_alike_layers():
    line = [1000 + 7 * n for n in range(30)]
    pieces = [[700 - 20 * n for n in range(30)], [100 + n for n in range(30)], [20 * n - 250 for n in range(30)]]
    assert numbers_run(pieces[0], line) == 3
    assert numbers_run(map(max, *pieces[:2]), line) <= 6
    assert numbers_run(map(max, *pieces), line) <= 10
    concave = [400 - abs(n - 14) for n in range(30)]
    assert numbers_run(concave, line) == 30
    assert numbers_run(pieces[0], [*line[:-2], 5000, 5007]) == 30


def test_numbers_are_derived_only_where_layers_on_both_sides_are_alike():
    assert alike_runs("abbbbbbc") == [range(2, 7)]
    assert alike_runs("bbbbaaaab") == [range(1, 4), range(5, 8)]
    assert alike_runs("abcbcbc") == alike_runs("aaabbb") == []
    unlike = decoder(6, 1, Greedy())
    unlike.primary.block_3.register_forward_hook(lambda *_: None)
    first, *_ = estimate(unlike, 2).likenesses_of_layers()
    assert [list(each) for each in alike_runs(first)] == []  # only two alike on one side, two on the other


def test_segments_of_a_model_are_like_no_other():
    with FakeTensorMode():
        net = localize(chain(7), Greedy(), 10, 1, input_shape=(3, 32, 32))
    (likenesses,) = estimate(net, 2).likenesses_of_layers()
    assert len(likenesses) == 8 and alike_runs(likenesses) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: wrap(Greedy(), 8, 8, modules=1),
        pytest.param(lambda: wrap(AugLocal(2), 8, 8, modules=2), marks=pytest.mark.slow),
        pytest.param(lambda: decoder(3, 2, AugLocal(2)), marks=pytest.mark.slow),
    ],
    ids=["one module", "resnet", "gpt"],
)
def test_the_plan_is_the_best_of_all(make):
    """Against a run of every mixture, for every budget that makes a difference."""
    with FakeTensorMode():
        net = make()
    planned, found = estimate(net), {}
    for ways in itertools.product(*net.recompute_ways):
        run = planned.cost(ways)
        found[ways] = max(run.end, *(m.peak for m in run.modules)), sum(m.flops for m in run.modules)
    sizes = sorted({size for size, _ in found.values()})
    plans = {size: plan_memory(net, BATCH, sgd, memory_budget=size, overlap=False) for size in (sizes[1], sizes[-2])}
    plans[sizes[0]] = plan_memory(net, BATCH, sgd, recompute="peak")
    assert any(isinstance(way, int) for plan in plans.values() for way in plan.recompute)
    for budget, plan in plans.items():
        assert found[plan.recompute] == (plan.predicted_bytes, plan.step_flops + plan.recomputed_flops)
        assert plan.predicted_bytes <= budget
        assert found[plan.recompute][1] == min(flops for size, flops in found.values() if size <= budget)
    with pytest.raises(MemoryBudgetError):
        plan_memory(net, BATCH, sgd, memory_budget=sizes[0] - 1, overlap=False)


@pytest.mark.parametrize(
    ("rule", "recompute"),
    [(AugLocal(2), [1, 2]), pytest.param(ContSup("R1E"), [2, 1], marks=pytest.mark.slow)],
    ids=["AugLocal", "ContSup"],
)
def test_the_meters_reading_with_numbers_of_layers(rule, recompute):
    net = wrap(rule, 8, 8, modules=2)
    plan = plan_memory(net, BATCH, sgd, recompute=recompute)
    assert plan.recompute == tuple(recompute) and "first layer" in str(plan) and "first 2 layers" in str(plan)
    assert metered(LocalStep(net, sgd, plan=plan)) == plan.predicted_bytes
    plain = plan_memory(net, BATCH, sgd, recompute="none")
    assert plan.predicted_bytes < plain.predicted_bytes and plan.recomputed_flops > 0
    assert plain.module_peaks[0].keys() == {"none", "auxiliary", "all"}  # numbers are not run where none is asked for


def test_nothing_more_is_run_where_everything_fits(monkeypatch):
    net = wrap(AugLocal(2), 8, 8, modules=2)
    free = plan_memory(net, BATCH, sgd, recompute="none")
    monkeypatch.setattr(MeasuredWays, "run_numbers", lambda self: pytest.fail("numbers of layers were run"))
    plan = plan_memory(net, BATCH, sgd, memory_budget=free.predicted_bytes, overlap=False)
    assert plan.recompute == ("none", "none")

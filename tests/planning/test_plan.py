"""Planned memory: the figure of a mixture, against the meter on real tensors, and the choice against all others."""

from __future__ import annotations

import copy
import time
from functools import partial

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext import AugLocal, ContSup, Greedy, LocalSequential, models
from auglocal_ext.cost import FlopMeter, count_flops
from auglocal_ext.memory import MemoryMeter
from auglocal_ext.planning import MemoryBudgetError, plan_memory
from auglocal_ext.planning.estimate import StepEstimate, _fit_to_fake
from auglocal_ext.planning.memory import parse_bytes
from auglocal_ext.step import LocalStep
from auglocal_ext.step.module_costs import module_flops

RULES = {"AugLocal d=2": AugLocal(2), "AugLocal d=6": AugLocal(6), "ContSup R1E": ContSup("R1E")}
WAYS = ("none", "auxiliary", "all")
BATCH = 16


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-3)


def wrap(rule, depth=20, width=8, **options):
    torch.manual_seed(5)
    return LocalSequential(models.resnet_cifar(depth, width=width), rule, 10, (3, 32, 32), **options)


def estimate(net, batch=BATCH, optimizer=sgd, **options):
    settings = {"autocast": None, "clip_norm": None, "clip": "module", "accumulate": 1} | options
    return StepEstimate(net, batch, optimizer, params=list(net.parameters()), **settings)


def images(batch=BATCH, dtype=torch.float32):
    return torch.randn(batch, 3, 32, 32, dtype=dtype), torch.randint(0, 10, (batch,))


def metered(step, batch=BATCH, calls=1, x=None):
    """Peak of a later step on real tensors."""
    given, y = images(batch)
    x = given if x is None else x
    for _ in range(calls):
        step(x, y)
    for _ in range(calls - 1):
        step(x, y)
    with MemoryMeter() as meter:
        meter.track(step.net, step.optimizer, x, y)
        step(x, y)
    return meter.peak_bytes


@pytest.mark.parametrize(
    ("name", "autocast"),
    [
        ("AugLocal d=2", None),
        ("ContSup R1E", torch.bfloat16),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in [("AugLocal d=6", None), ("ContSup R1E", None)]),
        *(pytest.param(f"AugLocal d={d}", torch.bfloat16, marks=pytest.mark.slow) for d in (2, 6)),
    ],
    ids=str,
)
def test_the_meters_reading_on_real_tensors(name, autocast):
    net = wrap(RULES[name], depth=14)
    plan = plan_memory(net, BATCH, sgd, autocast=autocast, recompute="peak")
    step = LocalStep(net, sgd, autocast=autocast, plan=plan)
    assert metered(step) == step.plan.predicted_bytes
    for way in WAYS:
        net.recompute = way
        predicted = max(peaks[way] for peaks in step.plan.module_peaks)
        assert metered(step) == predicted, way


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "calls"),
    [
        ({"optimizer": adamw}, 1),
        ({"clip_norm": 1.0}, 1),
        ({"clip_norm": 1.0, "clip": "global"}, 1),
        ({"accumulate": 3}, 3),
    ],
    ids=["AdamW", "clipped", "clipped globally", "accumulated"],
)
def test_the_meters_reading_with_other_updates(options, calls):
    net = wrap(AugLocal(3), width=16)
    options = {"optimizer": sgd, **options}
    plan = plan_memory(net, 4, **options)
    assert metered(LocalStep(net, **options), 4, calls) == pytest.approx(plan.predicted_bytes, rel=0.02)


@pytest.mark.slow
def test_channels_last_and_double():
    for net in (wrap(AugLocal(2)).to(memory_format=torch.channels_last), wrap(AugLocal(2)).double()):
        weight = next(net.parameters())
        x = torch.randn(BATCH, 3, 32, 32, dtype=weight.dtype)
        if not weight.is_contiguous():
            x = x.to(memory_format=torch.channels_last)
        plan = plan_memory(net, BATCH, sgd)
        assert metered(LocalStep(net, sgd), x=x) == pytest.approx(plan.predicted_bytes, rel=0.02)


@pytest.mark.parametrize(
    "rule", [pytest.param(r, marks=[] if n == "AugLocal d=2" else pytest.mark.slow, id=n) for n, r in RULES.items()]
)
def test_the_plans_figure_is_that_of_a_run_with_its_choice(rule):
    """Every module runs in it, and each recomputes what the plan says."""
    net = wrap(rule)
    plan = plan_memory(net, BATCH, sgd, recompute="peak")
    run = estimate(net).cost(plan.recompute, alike=False)
    assert max(run.end, *(module.peak for module in run.modules)) == plan.predicted_bytes
    assert run.base == plan.base_bytes
    assert sum(module.flops for module in run.modules) == plan.step_flops + plan.recomputed_flops
    chosen = zip(plan.module_peaks, plan.recompute, strict=True)
    assert [module.peak for module in run.modules] == [peaks[way] for peaks, way in chosen]
    if rule == AugLocal(2):  # in the others one way suits all modules
        assert len(set(plan.recompute)) > 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "options"),
    [("none", {}), ("all", {"clip_norm": 1.0, "clip": "global"}), ("auxiliary", {"accumulate": 2})],
    ids=str,
)
def test_modules_that_are_alike_run_once_and_count_each(way, options):
    alike, ran = [], []
    planned = estimate(wrap(AugLocal(3)), **options)
    for counted, setting in ((alike, True), (ran, False)):
        with MemoryMeter() as meter:
            counted.append(planned.cost(way, alike=setting))
        counted.append(meter.events)
    assert alike[0] == ran[0]
    assert alike[1] < ran[1]


def test_modules_that_differ_in_anything_run_each():
    def own(change):
        net = wrap(AugLocal(2), depth=14)
        change(net)
        planned = estimate(net)
        cost = planned.cost("none")
        assert cost == planned.cost("none", alike=False)
        return [module.added for module in cost.modules[1:3]]  # alike but for the change

    same = own(lambda net: None)
    assert same[0] == same[1]
    hooked = own(lambda net: [m.register_forward_hook(lambda *_: None) for m in net.primary[2].modules()])
    assert hooked[0] == same[0] < hooked[1]  # hooked layers run eagerly
    frozen = own(lambda net: net.primary[2].requires_grad_(False))
    assert frozen[0] == same[0] > frozen[1]


def test_parameters_without_a_gradient_have_no_optimizer_state():
    class Idle(nn.Sequential):
        def __init__(self, width):
            super().__init__(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
            self.spare = nn.Parameter(torch.zeros(100_000))

        def forward(self, x):
            return self[1](self[0](x))

    layers = nn.Sequential(*(Idle(3) for _ in range(4)), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    net = LocalSequential(layers, ContSup("R0", head="0c1f"), 10, (3, 32, 32))
    plan = plan_memory(net, 2, sgd)
    assert plan.base_bytes < 4 * 400_000 + 100_000
    assert metered(LocalStep(net, sgd), 2) == pytest.approx(plan.predicted_bytes, rel=0.02)


def test_planning_leaves_everything_as_it_was():
    net = wrap(AugLocal(2), depth=8)
    net.eval()
    before = copy.deepcopy(net.state_dict())
    state = torch.get_rng_state()
    plan_memory(net, BATCH, sgd, recompute="peak")
    assert torch.equal(torch.get_rng_state(), state)
    assert not net.training and set(net.recompute) == {"none"}
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert all(parameter.grad is None for parameter in net.parameters())


def test_fake_networks_and_parameter_groups():
    def groups(net):
        norms = [p for p in net.parameters() if p.dim() == 1]
        return [
            {"params": (p for p in net.parameters() if p.dim() > 1)},
            {"params": norms, "weight_decay": 0.0},
        ]

    with FakeTensorMode():
        fake = wrap(AugLocal(2), depth=8)
        inside = plan_memory(fake, BATCH, sgd, params=groups(fake), recompute="peak")
    assert plan_memory(fake, BATCH, sgd, params=groups(fake), recompute="peak") == inside
    real = wrap(AugLocal(2), depth=8)
    assert plan_memory(real, BATCH, sgd, params=groups(real), recompute="peak") == inside
    step = LocalStep(real, sgd, params=groups(real), plan=inside)
    assert real.recompute == inside.recompute
    assert [len(group["params"]) > 0 for group in step.optimizer.param_groups] == [True, True]
    assert plan_memory(real, BATCH, sgd, autocast=torch.float16).predicted_bytes < inside.predicted_bytes


def test_what_a_gpus_optimizer_has_beside_the_cpus_is_left_out():
    net = wrap(AugLocal(2), depth=8)
    plain = plan_memory(net, BATCH, adamw)
    gpu = plan_memory(net, BATCH, lambda params: torch.optim.AdamW(params, lr=1e-3, capturable=True))
    assert gpu.predicted_bytes == plain.predicted_bytes


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adagrad], ids=lambda kind: kind.__name__)
def test_a_fused_optimizer_has_no_temporaries(kind):
    """At this batch size a module's peak is in its update."""
    net = wrap(Greedy(), depth=8, width=32)
    plans = []
    for fused in (True, False):
        plans.append(plan_memory(net, 1, optimizer := partial(kind, lr=1e-3, fused=fused)))
        assert metered(LocalStep(net, optimizer, plan=plans[-1]), 1) == plans[-1].predicted_bytes
    assert plans[0].base_bytes == plans[1].base_bytes
    assert plans[0].predicted_bytes < plans[1].predicted_bytes


def test_on_cuda_an_optimizer_is_planned_in_the_form_that_it_takes_there():
    class Own(torch.optim.AdamW):
        pass

    def planned(optimizer, on_cuda, may_shard=False):
        _fit_to_fake(optimizer, on_cuda, may_shard)
        (group,) = optimizer.param_groups
        return group.get("fused"), group["foreach"], group["capturable"]

    params = [nn.Parameter(torch.zeros(2))]
    for kind in (torch.optim.AdamW, Own):
        assert planned(kind(params, capturable=True), True) == (True, None, False)
        assert planned(kind(params), False) == (None, None, False)
        assert planned(kind(params), True, may_shard=True) == (None, None, False)
        assert planned(kind(params, foreach=True), True) == (None, True, False)
        assert planned(kind(params, fused=False), True) == (False, None, False)
    assert planned(torch.optim.NAdam(params), True) == (None, True, False)  # which has no fused form
    assert planned(torch.optim.NAdam(params), False) == (None, None, False)


def test_a_step_takes_its_plan():
    net = wrap(AugLocal(2), depth=8)
    plan = plan_memory(net, BATCH, sgd, recompute="peak")
    step = LocalStep(net, sgd, plan=plan)
    assert step.plan is plan and net.recompute == plan.recompute != ("none",) * net.num_modules
    free = plan_memory(net, BATCH, sgd, recompute="none").predicted_bytes
    LocalStep(net, sgd, plan=plan_memory(net, BATCH, sgd, memory_budget=free))
    assert set(net.recompute) == {"none"}
    assert LocalStep(net, sgd).plan is None
    with pytest.raises(ValueError, match=f"batches of at most {BATCH} samples, and this one has {BATCH + 1}"):
        step(*images(BATCH + 1))
    assert step(*images(BATCH)).loss.isfinite() and step(*images(2)).loss.isfinite()


def test_budget():
    net = wrap(AugLocal(2), depth=8)
    free, lowest = (plan_memory(net, BATCH, sgd, recompute=way) for way in ("none", "peak"))
    assert lowest.predicted_bytes < free.predicted_bytes and lowest.recomputed_flops > free.recomputed_flops == 0
    shares = []
    for budget in (free.predicted_bytes, (free.predicted_bytes + lowest.predicted_bytes) // 2, lowest.predicted_bytes):
        plan = plan_memory(net, BATCH, sgd, memory_budget=budget, overlap=False)
        assert plan.predicted_bytes <= budget
        shares.append(plan.recomputed_share)
    assert shares[0] == 0 and shares == sorted(shares) and shares[-1] == lowest.recomputed_share
    with pytest.raises(MemoryBudgetError, match=f'{lowest.predicted_bytes:,} bytes.*recompute="peak"') as refused:
        plan_memory(net, BATCH, sgd, memory_budget=lowest.predicted_bytes - 1)
    assert refused.value.least_bytes == lowest.predicted_bytes  # with which a plan was made above


@pytest.mark.slow
def test_overlap():
    net = wrap(AugLocal(2), depth=8)
    alone = plan_memory(net, BATCH, sgd, recompute="none")
    both = plan_memory(net, BATCH, sgd, recompute="none", overlap=True)
    assert not alone.overlap and both.overlap
    assert alone.predicted_bytes < both.predicted_bytes < 2 * alone.predicted_bytes
    assert plan_memory(net, BATCH, sgd, memory_budget=both.predicted_bytes).overlap
    assert not plan_memory(net, BATCH, sgd, memory_budget=both.predicted_bytes - 1).overlap
    assert not plan_memory(net, BATCH, sgd, recompute="peak").overlap
    with pytest.raises(MemoryBudgetError, match="with overlap off") as refused:
        plan_memory(net, BATCH, sgd, memory_budget=1000, overlap=True)
    assert refused.value.least_bytes == plan_memory(net, BATCH, sgd, recompute="peak").predicted_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (7, 7),
        ("7", 7),
        ("400MB", 400_000_000),
        ("0.4GiB", int(0.4 * 2**30)),
        (" 1.5 KB", 1500),
        ("2TiB", 2**41),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "4 parsecs", "-1GB", "1e3", "0.4 gib", f"{10**400}GB", 0, -5, True, 0.4, None]
)
def test_wrong_sizes(text):
    with pytest.raises(ValueError, match='"400MB"'):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute": "peak", "memory_budget": "1GB"}, "Leave recompute out"),
        ({"recompute": "some"}, "recompute must be one of"),
        ({"batch_size": 0}, "batch_size is the number of images"),
        ({"overlap": "yes"}, "overlap must be"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        plan_memory(wrap(ContSup("R0"), depth=8), **{"batch_size": 4, "optimizer": sgd, **options})


def test_the_table():
    plan = plan_memory(wrap(AugLocal(2), depth=14), BATCH, sgd, recompute="peak")
    text = str(plan)
    _, header, *rows, peak, between = text.splitlines()
    assert header.split() == ["modules", *WAYS, "chosen", "its", "peak", "FLOPs", "added"]
    assert any("-" in row.split()[0] for row in rows)  # modules that look alike share a line
    first, last = rows[0].split()[0].split("-")[0], rows[-1].split()[0].split("-")[-1]
    assert (first, int(last)) == ("0", len(plan.recompute) - 1)
    assert f"{plan.predicted_bytes:,} bytes" in peak
    assert f"{plan.base_bytes:,} bytes" in between and "overlap off" in between
    assert max(map(len, (peak, between))) <= 120  # a terminal's width, nearly


def test_flops_are_counted_as_torch_counts_them():
    with FakeTensorMode():
        net = wrap(AugLocal(2), depth=8)
        x, y = images()

        def step():
            net(x, y).loss.backward()

        with FlopMeter() as meter:
            step()
        assert meter.flops == count_flops(step) > 0


@pytest.mark.parametrize("way", ["none", "all"])
def test_stages_are_balanced_by_the_flops_of_the_plan(way):
    """The step counts them itself, every module by its own run."""
    net = wrap(AugLocal(2), depth=8)
    assert module_flops(net, sgd, way) == [module.flops for module in estimate(net, 2).cost(way).modules]


@pytest.mark.slow
def test_a_deep_network_is_planned_in_seconds():
    net = LocalSequential(models.resnet110(), AugLocal(6), 10, (3, 32, 32))
    begin = time.perf_counter()
    plan = plan_memory(net, 1024, sgd, autocast=torch.bfloat16, recompute="peak")
    assert time.perf_counter() - begin < 60
    assert plan.predicted_bytes < 0.40e9


@pytest.mark.parametrize("optimizer", [torch.optim.ASGD, torch.optim.Adafactor])
def test_an_optimizer_that_reads_values_is_named(optimizer):
    net = LocalSequential(models.resnet_cifar(8, width=4), Greedy(), num_classes=10, input_shape=(3, 32, 32))
    with pytest.raises(ValueError, match=f"{optimizer.__name__} reads values of tensors .*predict with another"):
        plan_memory(net, 4, lambda params: optimizer(params, lr=0.1), recompute="peak")

"""A step takes the plan that was made for it, and no other."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from test_plan import BATCH, adamw, wrap
from torch import nn

from auglocal_ext import AugLocal, Greedy, LocalSequential, LocalStep
from auglocal_ext.planning import plan_memory, plan_stages

OTHER_STEPS = {
    "rule: planned AugLocal.*depth=2.*, here AugLocal.*depth=3": (lambda: wrap(AugLocal(3), 8), {}),
    "number of local modules: planned 3, here 2": (lambda: wrap(AugLocal(2), 8, modules=2), {}),
    "local module 0: planned stem of .*, fused, here stem of .* parameters. Call": (
        lambda: wrap(AugLocal(2), 8, fused=False),
        {},
    ),
    "primary.stem.conv.weight: planned float32 .8, 3, 3, 3., here float64 .8,": (
        lambda: wrap(AugLocal(2), 8).double(),
        {},
    ),
    "primary.stem.conv.weight: planned float32 .*., here float32 .*, frozen": (
        lambda: frozen(wrap(AugLocal(2), 8)),
        {},
    ),
    "memory format: planned contiguous, here channels last": (
        lambda: wrap(AugLocal(2), 8).to(memory_format=torch.channels_last),
        {},
    ),
    "autocast: planned None, here torch.bfloat16": (None, {"autocast": torch.bfloat16}),
    "clipping: planned none, here global": (None, {"clip_norm": 1.0, "clip": "global"}),
    "accumulate: planned 1, here 2": (None, {"accumulate": 2}),
    r"parameter group 0: planned SGD\(momentum, nesterov, weight_decay\) of .*, here AdamW\(": (
        None,
        {"optimizer": adamw},
    ),
    r"parameter group 0: planned .*, here SGD\(\) of": (
        None,
        {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1)},
    ),
    "update of parameter group 0: planned for-loop, here fused. Call .*pass fused=True": (
        None,
        {"optimizer": lambda params: sgd(params, fused=True)},
    ),
    "update of parameter group 0: planned for-loop, here foreach": (
        None,
        {"optimizer": lambda params: sgd(params, foreach=True)},
    ),
    r"module primary.stem.conv: planned .*stride=\(1, 1\).*, here .*stride=\(2, 2\)": (
        lambda: strided(wrap(AugLocal(2), 8)),
        {},
    ),
}


def sgd(params, **form):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4, **form)


def strided(net):
    """The same parameters on smaller maps."""
    net.primary.stem.conv.stride = (2, 2)
    return net


def frozen(net):
    next(net.parameters()).requires_grad_(False)
    return net


@pytest.fixture(scope="module")
def plan():
    return plan_memory(wrap(AugLocal(2), depth=8), BATCH, sgd, recompute="peak")


@pytest.mark.parametrize("message", OTHER_STEPS)
def test_a_plan_for_another_step_is_refused(plan, message):
    build, options = OTHER_STEPS[message]
    net = wrap(AugLocal(2), depth=8) if build is None else build()
    before = net.recompute
    with pytest.raises(ValueError, match=f"made for another step, .*{message}"):
        LocalStep(net, **{"optimizer": sgd, "plan": plan, **options})
    assert net.recompute == before


def test_a_plan_is_for_equal_networks_and_any_learning_rate(plan):
    """Values of weights, rates and the forms that torch has of an optimizer change no plan."""
    torch.manual_seed(0)
    net = wrap(AugLocal(2), depth=8)
    LocalStep(
        net,
        lambda params: torch.optim.SGD(
            params, lr=torch.tensor(3.0), momentum=0.5, nesterov=True, weight_decay=1.0, foreach=False
        ),
        plan=plan,
    )
    assert net.recompute == plan.recompute


def test_a_plan_for_a_fused_update_is_for_no_other():
    def fused(params):
        return sgd(params, fused=True)

    net = wrap(AugLocal(2), depth=8)
    plan = plan_memory(net, BATCH, fused)
    with pytest.raises(ValueError, match="update of parameter group 0: planned fused, here for-loop"):
        LocalStep(net, sgd, plan=plan)
    LocalStep(net, fused, plan=plan)
    LocalStep(net, fused, plan=plan)  # the first step changes nothing that is compared


def test_autocast_around_a_planned_step_is_refused():
    """It would double, or halve, what was planned."""
    net = wrap(AugLocal(2), depth=8)
    x, y = torch.randn(BATCH, *net.network.input_shape), torch.zeros(BATCH, dtype=torch.long)
    plan = plan_memory(net, BATCH, sgd)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(ValueError, match=r"outside of torch.autocast.* pass autocast= to plan_memory"):
            plan_memory(net, BATCH, sgd)
        with pytest.raises(ValueError, match=r"outside of torch.autocast"):
            LocalStep(net, sgd, plan=plan)(x, y)
        half = plan_memory(net, BATCH, sgd, autocast=torch.bfloat16)
        assert half.predicted_bytes < plan.predicted_bytes
        LocalStep(net, sgd, plan=half, autocast=torch.bfloat16)(x, y)
    LocalStep(net, sgd, plan=plan)(x, y)


def test_functions_of_a_task_are_compared_by_name():
    """A network that is built anew has functions of its own, at other addresses."""

    def build():
        layers = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
        return LocalSequential(layers, Greedy(), criterion=lambda output, y: output.sum(), outputs=3, input_shape=(6,))

    first, second = build(), build()
    assert repr(first.task) != repr(second.task)
    LocalStep(second, sgd, plan=plan_memory(first, 4, sgd))


def test_a_plan_is_plain_data(plan):
    assert json.loads(json.dumps(asdict(plan)))["made_for"]["accumulate"] == 1
    assert "made_for" not in repr(plan)


def test_what_contradicts_a_plan_is_refused(plan):
    net = wrap(AugLocal(2), depth=8)
    for options, message in (
        ({"recompute": "all"}, "the plan says what is recomputed: leave out recompute='all'"),
        ({"overlap": True}, r"the plan has overlap=False, .* plan_memory\(..., overlap=True\)"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalStep(net, sgd, plan=plan, **options)
    LocalStep(net, sgd, plan=plan, overlap=False)
    stages = plan_stages(net, 4, sgd, stages=2)
    with pytest.raises(
        TypeError, match="plan must be what plan_memory returned, got StagePlan; .*stage_cuts=plan.cuts"
    ):
        LocalStep(net, sgd, plan=stages)
    with pytest.raises(TypeError, match="got tuple$"):
        LocalStep(net, sgd, plan=plan.recompute)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute": "peak"}, 'plan=plan_memory(net, batch_size, optimizer, recompute="peak")'),
        ({"memory_budget": "1GB", "batch_size": 4}, "plan=plan_memory(net, 4, optimizer, memory_budget='1GB')"),
        ({"batch_size": 4}, 'stage_cuts=Balanced(by="time", batch_size=4)'),
    ],
)
def test_arguments_of_a_plan_name_the_plan(options, message):
    with pytest.raises(ValueError) as refused:
        LocalStep(wrap(Greedy(), depth=8), sgd, **options)
    assert message in str(refused.value)

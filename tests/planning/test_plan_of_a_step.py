"""A step takes the plan that was made for it, and no other."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from test_plan import BATCH, adamw, sgd, wrap
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
}


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

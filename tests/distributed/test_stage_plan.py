"""Planned stages beside real ones: bytes, messages and FLOPs."""

from __future__ import annotations

import pytest
import torch
from ranks import run
from replicated import network, sgd
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from auglocal_ext import Greedy, LocalSequential, LocalStep
from auglocal_ext.cost import FlopMeter
from auglocal_ext.memory import MemoryMeter
from auglocal_ext.memory.meter import OPTIMIZER_STATE
from auglocal_ext.planning import plan_memory, plan_stages

BATCH = 6


def batch():
    return torch.randn(BATCH, 3, 16, 16, dtype=torch.float64), torch.randint(0, 10, (BATCH,))


def _measured(rank, plans):
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "replica"))
    for (rule, replicas, recompute), plan in plans.items():
        net = network(rule)
        step = LocalStep(net, sgd, mesh=grid if replicas == 2 else grid["stage"], recompute=recompute)
        stage = step._processes.stage
        x, y = batch()
        for _ in range(3):
            step(x, y)
        links = [link for link in (stage._from, stage._to) if link is not None]
        messages = [t for link in links for asked in link._asked for t in (asked.number, *asked.tensors)]
        messages += [t for link in links for _, t in link._sending]
        modules = net.local_modules[stage.first : stage.last + 1]
        parts = nn.ModuleList([part for module in modules for part in module.parts()])
        planned = plan.stages[stage.index]
        assert planned.modules == (stage.first, stage.last)
        sent = sum(t.nbytes for _, t in stage._to._sending) if stage._to else 0
        assert sent == planned.sends
        with FlopMeter() as flops, MemoryMeter() as meter:
            meter.track(parts, step.optimizer, x, y, messages)
            assert meter.live_bytes == planned.peak - planned.step
            assert meter.live_categories[OPTIMIZER_STATE] == planned.optimizer_state
            del messages
            step(x, y)
        assert flops.flops == planned.flops
        assert meter.peak_bytes == planned.peak, (rule, replicas, recompute, meter.peak_bytes - planned.peak)
        step.close()


@pytest.mark.slow
def test_planned_bytes_are_the_meters_reading():
    cases = [("auglocal", 1, "none"), ("contsup", 1, "all"), ("contsup", 1, "none"), ("auglocal", 2, "none")]
    plans = {
        (rule, replicas, way): plan_stages(network(rule), BATCH, sgd, stages=2, replicas=replicas, recompute=way)
        for rule, replicas, way in cases
    }
    run(4, _measured, plans)


def test_one_stage_is_the_whole_step():
    net = network("contsup")
    whole, plan = plan_memory(net, BATCH, sgd, recompute="none", overlap=False), plan_stages(net, BATCH, sgd, stages=1)
    (only,) = plan.stages
    assert only.peak == whole.predicted_bytes and only.flops == whole.step_flops
    assert plan.balance == plan.speedup == 1 and plan.cuts == ()
    assert only.sends == only.in_flight == only.averages == 0


def test_shards_divide_parameters_and_state():
    layers = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 512), nn.Linear(512, 512))
    net = LocalSequential(layers, Greedy(), 512, (64,))
    plans = [plan_stages(net, BATCH, sgd, stages=2, replicas=4, shard=shard) for shard in (False, True)]
    for whole, part in zip(*(plan.stages for plan in plans), strict=True):
        sizes = part.parameters, part.optimizer_state, part.gradients
        assert sizes == (whole.parameters / 4, whole.optimizer_state / 4, whole.gradients / 4)
        assert (part.flops, part.sends, part.averages) == (whole.flops, whole.sends, whole.averages)
        modules = net.local_modules[part.modules[0] : part.modules[1] + 1]
        # A module's parameters are whole while it runs.
        assert part.step - whole.step == max(sum(p.nbytes for p in module.parameters()) for module in modules)
    assert "sharded" in str(plans[1]) and "sharded" not in str(plans[0])


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        ("greedy", {"stages": 9}, "9 stages need as many local modules"),
        ("greedy", {"stages": 0}, "stages must be a whole number of at least 1, got 0"),
        ("greedy", {"stages": 2, "shard": True}, "shard divides parameters among replicas"),
        ("greedy", {"stages": 2, "stage_cuts": (1, 2)}, r"1 increasing numbers .* got \(1, 2\)"),
        ("man", {"stages": 2}, "reads parameters of later layers"),
    ],
)
def test_what_cannot_be_planned_is_refused(rule, options, message):
    with pytest.raises(ValueError, match=message):
        plan_stages(network(rule), BATCH, sgd, **options)

"""Every rule on every kind of mesh: stages equal one process to the bit, replicas up to rounding.

The heads of ``HEADS`` are parts of one module, which does not know how many stages there are: two processes show what
there is to see of them. Rules, and rules as heads of others, run on all meshes.
"""

from __future__ import annotations

import pytest
import torch
from ranks import run
from replicated import COMPARING, RULES, network, one_process, parts, sgd, whole_batch
from test_stages import alone, assert_stage_equals
from torch.distributed.device_mesh import init_device_mesh

from auglocal_ext import DGL, MAN, AugLocal, ContSup, Greedy, InfoPro, LocalStep, PredSim
from auglocal_ext.auxiliary.base import parts_of
from auglocal_ext.distributed import balanced_cuts
from auglocal_ext.rules import FCNHead
from auglocal_ext.rules.base import HEADS
from auglocal_ext.step.module_costs import module_flops

WEIGHTS = ((0.5, 1.0), (1.0, 0.5))
CASES = RULES | COMPARING
CASES |= {f"head {head}": Greedy(head) for head in HEADS}
CASES["head fcn"] = Greedy(FCNHead(dropout=0))  # each stage draws its own random numbers
CASES |= {
    "man dgl": MAN(head=DGL()),
    "man infopro": MAN(head=InfoPro(*WEIGHTS)),
    "contsup auglocal": ContSup("R1E", head=AugLocal(2)),
    "contsup infopro": ContSup("E", head=InfoPro(*WEIGHTS, head=DGL())),
    "contsup contrast": ContSup("R2", head=InfoPro(*WEIGHTS, loss="contrast")),
    "contsup predsim": ContSup("R1", head=PredSim()),
    "predsim auglocal": PredSim(head=AugLocal(2)),
    "infopro auglocal": InfoPro(*WEIGHTS, head=AugLocal(2)),
}
STEPS = 4  # of replicas; a stage is at most two batches ahead of the next, and there are two


def expected(name):
    """What modules cost, and what one process comes to alone, with the parts in turn, and with the whole batch.

    Each process of each mesh would count FLOPs again to balance stages, which takes longer than its steps.
    """
    costs = module_flops(network(CASES[name]), sgd)
    in_turn = one_process(network(CASES[name]), 2, steps=STEPS)
    whole = whole_batch(network(CASES[name]), 2, steps=STEPS)
    return costs, alone(network(CASES[name])), in_turn.state_dict(), whole.state_dict()


def as_one(name):
    """Options with which replicas equal one process with the whole batch."""
    parts = parts_of(network(CASES[name]).auxiliary)
    compared = any(part.compares_samples or part.settings.task.compares_samples for part in parts)
    return {"sync_batch_norm": True, "gather_features": compared}


def _assert_close(name, what, mesh, replica, wanted, tolerance, **options):
    net = network(CASES[name])
    step = LocalStep(net, sgd, mesh=mesh, **options)
    for batch in parts(2, STEPS):
        step(*batch[replica])
    step.close()
    held = {key: value for key, value in net.state_dict().items() if not value.is_meta}
    assert held
    for key, value in held.items():
        difference = (value - wanted[key]).abs().max() if value.numel() else 0
        assert difference <= tolerance, f"{name}, {what}: {key} differs by {difference}"


def _two_processes(rank, names, path):
    stages, replicas = (init_device_mesh("cpu", (2,), mesh_dim_names=(kind,)) for kind in ("stage", "replica"))
    for name in names:
        costs, wanted, in_turn, whole = torch.load(f"{path}/{name}.pt")
        cuts = balanced_cuts(costs, 2)
        assert_stage_equals(f"{name}, 2 stages", network(CASES[name]), wanted, stages, stage_cuts=cuts)
        _assert_close(name, "2 replicas", replicas, rank, in_turn, 1e-10)
        _assert_close(name, "2 replicas as one", replicas, rank, whole, 1e-8, **as_one(name))


def _three_stages(rank, names, path):
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("stage",))
    for name in names:
        costs, wanted, *_ = torch.load(f"{path}/{name}.pt")
        cuts = balanced_cuts(costs, 3)
        assert_stage_equals(f"{name}, 3 stages", network(CASES[name]), wanted, mesh, stage_cuts=cuts)


def _four_processes(rank, names, path):
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "replica"))
    row = init_device_mesh("cpu", (4,), mesh_dim_names=("stage",))
    replica = grid.get_local_rank("replica")
    for name in names:
        costs, wanted, in_turn, whole = torch.load(f"{path}/{name}.pt")
        net, cuts = network(CASES[name]), {"stage_cuts": balanced_cuts(costs, 2)}
        if net.num_modules == 4:
            assert_stage_equals(f"{name}, 4 stages", net, wanted, row, stage_cuts=(1, 2, 3))
        _assert_close(name, "2 stages of 2 replicas", grid, replica, in_turn, 1e-10, **cuts)
        _assert_close(name, "2 stages of 2 replicas as one", grid, replica, whole, 1e-8, **cuts, **as_one(name))


@pytest.mark.slow
@pytest.mark.parametrize("third", range(3))
def test_every_rule_on_every_mesh(third, tmp_path):
    names = list(CASES)[third::3]
    for name in names:
        torch.save(expected(name), tmp_path / f"{name}.pt")
    run(2, _two_processes, names, str(tmp_path))
    rules = [name for name in names if not name.startswith("head ")]
    run(3, _three_stages, rules, str(tmp_path))
    run(4, _four_processes, rules, str(tmp_path))

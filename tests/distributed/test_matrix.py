"""Every rule on every kind of mesh: stages equal one process to the bit, replicas up to rounding."""

from __future__ import annotations

import pytest
import torch
from ranks import run
from test_replicas import COMPARING, RULES, network, one_process, parts, sgd, whole_batch
from torch.distributed.device_mesh import init_device_mesh

from auglocal_ext import DGL, MAN, AugLocal, ContSup, Greedy, InfoPro, LocalStep, PredSim
from auglocal_ext.auxiliary.base import parts_of
from auglocal_ext.rules import FCNHead
from auglocal_ext.rules.base import HEADS

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
STEPS = 10


def expected(name):
    """The state after all steps: of one process, of one that takes the parts in turn, of one with the whole batch."""
    alone = network(CASES[name])
    step = LocalStep(alone, sgd)
    for batch in parts(1, STEPS):
        step(*batch[0])
    in_turn, whole = one_process(network(CASES[name]), 2, steps=STEPS), network(CASES[name])
    return [net.state_dict() for net in (alone, in_turn, whole_batch(whole, 2, steps=STEPS))]


def compared(net):
    parts = parts_of(net.auxiliary)
    return any(part.compares_samples or part.settings.task.compares_samples for part in parts)


def _trained(name, mesh, data, replica=0, **options):
    net = network(CASES[name])
    step = LocalStep(net, sgd, mesh=mesh, **options)
    for batch in data:
        step(*batch[replica])
    step.close()
    return {key: value for key, value in net.state_dict().items() if not value.is_meta}


def _equal(name, what, state, wanted, tolerance):
    assert state
    for key, value in state.items():
        if tolerance is None:
            assert torch.equal(value, wanted[key]), f"{name}, {what}: {key}"
        else:
            difference = (value - wanted[key]).abs().max() if value.numel() else 0
            assert difference <= tolerance, f"{name}, {what}: {key} differs by {difference}"


def _three_stages(rank, names, path):
    mesh = init_device_mesh("cpu", (3,), mesh_dim_names=("stage",))
    for name in names:
        alone, *_ = torch.load(f"{path}/{name}.pt")
        _equal(name, "3 stages", _trained(name, mesh, parts(1, STEPS)), alone, None)


def _four_processes(rank, names, path):
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "replica"))
    row = init_device_mesh("cpu", (4,), mesh_dim_names=("stage",))
    for name in names:
        alone, in_turn, whole = torch.load(f"{path}/{name}.pt")
        _equal(name, "2 stages", _trained(name, grid["stage"], parts(1, STEPS)), alone, None)
        if network(CASES[name]).num_modules == 4:
            _equal(name, "4 stages", _trained(name, row, parts(1, STEPS)), alone, None)
        meshes = [("2 replicas", grid["replica"], rank % 2), ("2 stages of 2 replicas", grid, rank % 2)]
        gathers = compared(network(CASES[name]))
        for what, mesh, replica in meshes:
            state = _trained(name, mesh, parts(2, STEPS), replica)
            _equal(name, what, state, in_turn, 1e-10)
            options = {"sync_batch_norm": True, "gather_features": gathers}
            state = _trained(name, mesh, parts(2, STEPS), replica, **options)
            _equal(name, f"{what} as one", state, whole, 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("third", range(3))
def test_every_rule_on_every_mesh(third, tmp_path):
    names = list(CASES)[third::3]
    for name in names:
        torch.save(expected(name), tmp_path / f"{name}.pt")
    run(3, _three_stages, names, str(tmp_path))
    run(4, _four_processes, names, str(tmp_path))

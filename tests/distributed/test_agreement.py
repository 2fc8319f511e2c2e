"""Processes that are about to train different things: all of them refuse at the start, none waits for another."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import run
from replicated import network, sgd
from torch.distributed.device_mesh import init_device_mesh

from auglocal_ext import AugLocal, Balanced, LocalSequential, LocalStep, __version__, models
from auglocal_ext.distributed import DisagreementError
from auglocal_ext.nn import deferred
from auglocal_ext.step import agreement, module_costs


def frozen(odd):
    net = network()
    net.primary[0].requires_grad_(not odd)
    return net


def later(odd):
    with deferred(seed=int(odd)):
        return LocalSequential(models.resnet_cifar(8, width=4), AugLocal(2), 10, (3, 16, 16))


def wide(odd):
    torch.manual_seed(7)
    return LocalSequential(models.resnet_cifar(8, width=8 if odd else 4), AugLocal(2), 10, (3, 16, 16)).double()


def rate(odd):
    return lambda params: torch.optim.SGD(params, lr=0.2 if odd else 0.1)


#: What differs in the odd process, by the word in the message: the network, its optimizer and options.
CASES = {
    "the version of auglocal_ext": lambda odd: (network(), sgd, {}),
    "the rule": lambda odd: (network("greedy" if odd else "auglocal"), sgd, {}),
    "primary.*frozen": lambda odd: (frozen(odd), sgd, {}),
    r"primary.* \[4, 3, 3, 3\] and float64 \[8, 3, 3, 3\]": lambda odd: (wide(odd), sgd, {}),
    "the optimizer": lambda odd: (network(), rate(odd), {}),
    "accumulate: 1 and 2": lambda odd: (network(), sgd, {"accumulate": 2 if odd else 1}),
    "clip_norm: None and 1.0": lambda odd: (network(), sgd, {"clip_norm": 1.0 if odd else None}),
}
STAGES = {
    r"the initial weights .another seed": lambda odd: (network(seed=8 if odd else 7), sgd, {}),
    r"the initial weights .another": lambda odd: (later(odd), sgd, {}),
    "check_batches": lambda odd: (network(), sgd, {"check_batches": odd}),
    r"stage_cuts: \(1,\) and \(2,\)": lambda odd: (network(), sgd, {"stage_cuts": (2,) if odd else (1,)}),
    r"stage_cuts: None and Balanced": lambda odd: (network(), sgd, {"stage_cuts": TIMED if odd else None}),
}
TIMED = Balanced(2, by="time", batch_size=4)


def _refused(rank):
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "replica"))
    for mesh, odd, whose, cases in (
        (grid["replica"], rank % 2 == 1, "replicas 0 and 1", CASES),
        (grid["stage"], rank >= 2, "stages 0 and 1", CASES | STAGES),
        (grid, rank == 3, "ranks [012] and 3", CASES | STAGES),
    ):
        for what, build in cases.items():
            net, optimizer, options = build(odd)
            if "version" in what and odd:
                agreement.__version__ = "0.0"
            with pytest.raises(DisagreementError, match=f"{whose} differ in {what}"):
                LocalStep(net, optimizer, mesh=mesh, **options)
            agreement.__version__ = __version__
    _measured(rank, grid)


def _measured(rank, grid):
    """All stages, and their replicas, take the cuts that the first process has measured."""
    net, times = network(), []
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    measure = module_costs.module_times

    def measured(*args, **options):
        assert rank == 0
        times.extend(measure(*args, **options))
        assert len(times) == net.num_modules and min(times) > 0
        assert torch.equal(random, torch.get_rng_state())
        for key, value in net.state_dict().items():
            assert torch.equal(value, state[key]), key
        return [1.0, 1.0, 5.0] if rank == 0 else [5.0, 1.0, 1.0]

    module_costs.module_times = measured
    step = LocalStep(net, sgd, mesh=grid, stage_cuts=TIMED)
    assert step._processes.stage.first == (0 if rank < 2 else 2)
    assert (len(times) > 0) == (rank == 0)
    module_costs.module_times = measure
    for net, options, message in (
        (network(), {"stage_cuts": Balanced(3, "time", 4)}, "asks for 3 stages, and the mesh has 2"),
        (network(), {"stage_cuts": Balanced(2)}, "stages are balanced by FLOPs or measured time"),
        (later(False), {"stage_cuts": TIMED}, "measures .*built inside deferred.* name the cuts"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalStep(net, sgd, mesh=grid, **options)


@pytest.mark.slow
def test_whatever_differs_is_refused_by_all():
    run(4, _refused)

"""``LocalStep.save`` and ``load``: saved among any stages and replicas, resumed among any others, or in one process."""

from __future__ import annotations

import os
import random
import signal
from contextlib import contextmanager

import pytest
import torch
from ranks import run
from replicated import mesh as replicas
from replicated import network, parts, sgd
from test_stages import mesh
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from auglocal_ext import LocalStep
from auglocal_ext.distributed import CheckpointError, checkpoint_folder
from auglocal_ext.nn import deferred

BATCHES = [batch for (batch,) in parts(1, 6)]


def adamw(params):
    """Two groups with other options."""
    params = list(params)
    wide = [p for p in params if p.dim() > 1]
    return torch.optim.AdamW([{"params": wide}, {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0}])


OPTIMIZERS = {"sgd": ("contsup", sgd), "adamw": ("auglocal", adamw)}


def train(step, batches):
    for x, y in batches:
        step(x, y)


def one_process(name, batches=BATCHES):
    rule, optimizer = OPTIMIZERS[name]
    step = LocalStep(network(rule), optimizer)
    train(step, batches)
    return step


def saved_halfway(folder, name):
    """Saves a run of one process after three batches; the states at its end."""
    step = one_process(name, BATCHES[:3])
    step.save(folder / name, {"batches": 3})
    train(step, BATCHES[3:])
    return states(step)


def go_on(step, folder, batches, before=lambda number: None):
    """Trains on from the last checkpoint, and saves after every second batch; ``before(number)`` precedes each."""
    begun = step.load(folder)["batches"] if folder.exists() else 0
    for number in range(begun, len(batches)):
        before(number)
        step(*batches[number])
        if number % 2:
            step.save(folder, {"batches": number + 1})


def assert_states(step, expected, exactly=True):
    """The tensors that a process holds are those of one process's network and optimizer."""
    state, optimizer = expected
    for name, tensor in step.net.state_dict().items():
        if tensor.is_meta:
            continue
        if exactly:
            assert torch.equal(tensor, state[name]), name
        torch.testing.assert_close(tensor, state[name], rtol=1e-6, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert by_name(step).keys() <= optimizer.keys()
    for key, value in by_name(step).items():
        torch.testing.assert_close(value, optimizer[key], rtol=1e-6, atol=1e-6 * (not exactly))


def by_name(step):
    """The optimizer's state and options by parameter name."""
    named = {p: name for name, p in step.net.named_parameters()}
    found = {(named[p], key): value for p, state in step.optimizer.state.items() for key, value in state.items()}
    for group in step.optimizer.param_groups:
        for p in group["params"]:
            for key in ("lr", "weight_decay"):
                found[named[p], key] = group[key]
    return found


def states(step):
    return step.net.state_dict(), by_name(step)


def _resumed(rank, shape, folder, name, expected, saved_as=None, exactly=True):
    """Load at this mesh, save what was loaded if asked to, finish the run."""
    rule, optimizer = OPTIMIZERS[name.split()[0]]
    step = LocalStep(network(rule, seed=99), optimizer, mesh=shape)
    train(step, BATCHES[:1])  # state and weights of another run
    assert step.load(folder / name)["batches"] == 3
    if saved_as is not None:
        step.save(folder / saved_as, {"batches": 3})
    train(step, BATCHES[3:])
    assert_states(step, expected[name.split()[0]], exactly)
    step.close()


def _spread(rank, folder, name, expected):
    """One process to two stages, to two replicas."""
    _resumed(rank, mesh(2), folder, name, expected, f"{name} stages")
    rule, optimizer = OPTIMIZERS[name]
    step = LocalStep(network(rule, seed=98), optimizer, mesh=replicas(2))
    assert step.load(folder / f"{name} stages") == {"batches": 3}
    step.save(folder / f"{name} replicas", {"batches": 3})
    train(step, BATCHES[3:])
    assert_states(step, expected[name], exactly=False)
    with pytest.raises(CheckpointError, match="never: there is no such checkpoint"):
        step.load(folder / "never")
    with pytest.raises(CheckpointError, match=r"a disk is full \(rank 1\)"), _failing(rank == 1):
        step.save(folder / f"{name} stages")
    _meta(rank, folder, name, expected)


@contextmanager
def _failing(here):
    """No tensor can be written here."""
    with pytest.MonkeyPatch.context() as patch:
        if here:

            def fail(self, plan, planner):
                raise OSError("a disk is full")

            patch.setattr(FileSystemWriter, "write_data", fail)
        yield


def _meta(rank, folder, name, expected):
    """A network without memory gets this stage's alone, and its values from a checkpoint or as one process has them."""
    rule, optimizer = OPTIMIZERS[name]
    with torch.device("meta"):
        net = network(rule)
    step = LocalStep(net, optimizer, mesh=mesh(2))
    held = [not p.is_meta for p in net.parameters()]
    assert any(held) and not all(held)
    with pytest.raises(RuntimeError, match="no values yet: load a checkpoint"):
        step(*BATCHES[0])
    step.load(folder / f"{name} stages")
    train(step, BATCHES[3:])
    assert_states(step, expected[name])
    step.close()

    with deferred(seed=3):
        net = network(rule)
    step = LocalStep(net, optimizer, mesh=mesh(2))
    train(step, BATCHES)
    assert_states(step, expected["deferred"])
    train(step, BATCHES[: 1 - rank])  # the first stage is a batch ahead
    with pytest.raises(
        CheckpointError, match=r"ranks 0 and 1 differ in the number of batches: 7 and 6\. All processes"
    ):
        step.save(folder / "never")
    train(step, BATCHES[:rank])
    step.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_a_run_goes_on_among_other_processes(tmp_path, name):
    rule, optimizer = OPTIMIZERS[name]
    whole = saved_halfway(tmp_path, name)
    with deferred(seed=3):
        net = network(rule)
    net.materialise("cpu")
    begun = LocalStep(net, optimizer)
    train(begun, BATCHES)
    expected = {name: whole, "deferred": states(begun)}

    run(2, _spread, tmp_path, name, expected)

    for saved in ("stages", "replicas"):
        step = LocalStep(network(rule, seed=97), optimizer)
        step.load(tmp_path / f"{name} {saved}")
        train(step, BATCHES[3:])
        assert_states(step, expected[name])
    written = [sum(f.stat().st_size for f in (tmp_path / f"{name}{of}").glob("*/*.distcp")) for of in ("", " replicas")]
    assert 0 < written[1] < 1.05 * written[0]  # replicas write each tensor once


def _grids(rank, folder, expected):
    grid = mesh(2, 2)
    three = init_device_mesh("cpu", (3, 1), mesh_dim_names=("stage", "replica"))  # without the last process
    for name in OPTIMIZERS:
        _resumed(rank, grid, folder, name, expected, f"{name} grid", exactly=False)

    # Replicas of unequal parts: to the bit among the same processes.
    ours = [batch[grid.get_local_rank("replica")] for batch in parts(2, 6)]
    step = LocalStep(network("auglocal"), adamw, mesh=grid, clip_norm=0.1)
    train(step, ours[:3])
    step.save(folder / "unequal")
    train(step, ours[3:])
    step.close()
    again = LocalStep(network("auglocal", seed=96), adamw, mesh=grid, clip_norm=0.1)
    again.load(folder / "unequal")
    train(again, ours[3:])
    assert_states(again, states(step))
    again.close()
    if rank < 3:
        for name in OPTIMIZERS:
            _resumed(rank, three, folder, f"{name} grid", expected)


@pytest.mark.slow
def test_grids_of_stages_and_replicas(tmp_path):
    expected = {name: saved_halfway(tmp_path, name) for name in OPTIMIZERS}
    run(4, _grids, tmp_path, expected)


def _until_killed(rank, folder, dies):
    def before(number):
        if dies == (rank, number):
            os.kill(os.getpid(), signal.SIGKILL)
        if dies == (rank, f"saves {number}"):
            _die_at_the_last_moment()

    step = LocalStep(network("contsup", seed=95 if folder.exists() else 7), sgd, mesh=mesh(2))
    go_on(step, folder, BATCHES, before)
    torch.save(states(step), folder.with_name(f"{rank}.pt"))
    step.close()


def _die_at_the_last_moment():
    """When the tensors are written."""

    def finish(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint_folder._finish = finish


@pytest.mark.slow
def test_killed_processes_go_on_from_the_last_checkpoint(tmp_path):
    rank, batch = random.randrange(2), random.randrange(2, 4)
    for dies in ((rank, batch), (0, "saves 3")):
        with pytest.raises((ProcessExitedException, ProcessRaisedException)):
            run(2, _until_killed, tmp_path / "last", dies)
    assert len(list((tmp_path / "last").glob("tensors-*"))) == 2
    run(2, _until_killed, tmp_path / "last", None)

    expected = one_process("sgd")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, value in expected.net.state_dict().items():
        held = [state[name] for state, _ in found if not state[name].is_meta]
        assert len(held) == 1 and torch.equal(held[0], value), f"{name}, killed at {(rank, batch)}"

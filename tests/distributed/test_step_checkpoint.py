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
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from auglocal_ext import AugLocal, ContSup, Greedy, LocalSequential, LocalStep, PredSim
from auglocal_ext.distributed import CheckpointError, checkpoint
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
    step = one_process(name, BATCHES[:3])
    step.save(tmp_path / name, {"batches": 3})
    train(step, BATCHES[3:])
    with deferred(seed=3):
        net = network(rule)
    net.materialise("cpu")
    begun = LocalStep(net, optimizer)
    train(begun, BATCHES)
    expected = {name: states(step), "deferred": states(begun)}

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
    expected = {}
    for name in OPTIMIZERS:
        step = one_process(name, BATCHES[:3])
        step.save(tmp_path / name, {"batches": 3})
        train(step, BATCHES[3:])
        expected[name] = states(step)
    run(4, _grids, tmp_path, expected)


def _until_killed(rank, folder, dies):
    """Train on from the last checkpoint, and save after every second batch."""
    step = LocalStep(network("contsup", seed=95 if folder.exists() else 7), sgd, mesh=mesh(2))
    begun = step.load(folder)["batches"] if folder.exists() else 0
    for number in range(begun, 6):
        if dies == (rank, number):
            os.kill(os.getpid(), signal.SIGKILL)
        if dies == (rank, f"saves {number}"):
            _die_at_the_last_moment()
        step(*BATCHES[number])
        if number % 2:
            step.save(folder, {"batches": number + 1})
    torch.save(states(step), folder.with_name(f"{rank}.pt"))
    step.close()


def _die_at_the_last_moment():
    """When the tensors are written."""

    def finish(*args):
        os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._finish = finish


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


def _linears(*widths, rule=None):
    return LocalSequential(nn.Sequential(*map(nn.Linear, widths, widths[1:])), rule or Greedy(), widths[-1], widths[:1])


def _sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def _point(width=6):
    return torch.randn(4, width), torch.arange(4)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    step = LocalStep(_linears(6, 6, 6, 4), _sgd)
    step(*_point())
    step.save(tmp_path / "saved")
    wider = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 4))
    for net, optimizer, message in (
        (_linears(6, 6, 6, 4, rule=PredSim()), _sgd, "the rule of the checkpoint is Greedy, and here it is Pred"),
        (
            LocalSequential(wider, Greedy(), 4, (6,)),
            _sgd,
            r"0.weight has the shape \[6, 6\] in the checkpoint and \[8,",
        ),
        (_linears(6, 6, 6, 6, 4), _sgd, "last layers of the local modules of the checkpoint is .0, 1., and here"),
        (_linears(6, 6, 6, 4), torch.optim.AdamW, "the optimizer of the checkpoint is SGD, and here it is AdamW"),
        (_linears(6, 6, 6, 4), lambda p: _sgd(p[1:]), "other parameters of the optimizer: primary.0.weight only there"),
    ):
        other = LocalStep(net, optimizer)
        before = [p.clone() for p in net.parameters()]
        with pytest.raises(CheckpointError, match=message):
            other.load(tmp_path / "saved")
        assert all(map(torch.equal, before, net.parameters()))

    depths = [LocalStep(network(AugLocal(d)), sgd) for d in (2, 3)]
    depths[0].save(tmp_path / "depth")
    with pytest.raises(CheckpointError, match="the rule's depth of the checkpoint is 2, and here it is 3"):
        depths[1].load(tmp_path / "depth")


def test_what_cannot_be_saved_is_refused(tmp_path):
    step = LocalStep(_linears(6, 6, 4), _sgd, accumulate=2)
    step(*_point())
    with pytest.raises(RuntimeError, match="1 of 2 calls of an optimizer step are done"):
        step.save(tmp_path / "saved")
    step(*_point())
    with pytest.raises(CheckpointError, match="holds numbers, strings, .*; got a test_step_checkpoint.Strange"):
        step.save(tmp_path / "saved", {"strange": Strange()})
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with pytest.raises(CheckpointError, match="mine exists and is no checkpoint: name another folder"):
        step.save(tmp_path / "mine")
    with pytest.raises(CheckpointError, match="mine: not a checkpoint of LocalStep"):
        step.load(tmp_path / "mine")
    step.save(tmp_path / "saved")
    next((tmp_path / "saved").glob("*/*.distcp")).unlink()
    with pytest.raises(CheckpointError, match="No such file"):
        step.load(tmp_path / "saved")


class Strange:
    pass


@pytest.mark.parametrize("failing", ["mkdir", "write", "replace"])
def test_an_interrupted_save_leaves_the_last_checkpoint(tmp_path, monkeypatch, failing):
    step = LocalStep(_linears(6, 6, 4), _sgd)
    folder = tmp_path / "run" / "last"

    def stop(*args, **kwargs):
        raise OSError("stopped")

    def interrupted(number):
        with monkeypatch.context() as patch:
            if failing == "mkdir":
                patch.setattr(FileSystemWriter, "prepare_local_plan", stop)
            elif failing == "write":
                patch.setattr(FileSystemWriter, "finish", stop)
            else:
                patch.setattr(checkpoint.os, "replace", stop)
            with pytest.raises(CheckpointError, match="OSError: stopped"):
                step.save(folder, {"number": number})

    interrupted(0)
    assert not folder.exists()
    step.save(folder, {"number": 1})
    saved = {name: tensor.clone() for name, tensor in step.net.state_dict().items()}
    step(*_point())
    interrupted(2)
    assert step.load(folder) == {"number": 1}
    assert all(torch.equal(tensor, saved[name]) for name, tensor in step.net.state_dict().items())
    step.save(folder, {"number": 3})
    assert step.load(folder) == {"number": 3}
    assert len(list(folder.iterdir())) == 2 and list(folder.parent.iterdir()) == [folder]


def test_scheduler_scaler_and_options_come_back(tmp_path):
    def build():
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
        step = LocalStep(_linears(6, 6, 4), _sgd, grad_scaler=scaler)
        return step, torch.optim.lr_scheduler.StepLR(step.optimizer, 1, 0.5)

    step, scheduler = build()
    for _ in range(3):
        step(*_point())
        scheduler.step()
    assert step.grad_scaler.get_scale() == 2048.0
    step.save(tmp_path / "saved", {"scheduler": scheduler.state_dict()})
    again, resumed = build()
    resumed.load_state_dict(again.load(tmp_path / "saved")["scheduler"])
    assert again.state_dict()["grad_scaler"] == step.state_dict()["grad_scaler"]
    assert by_name(again)["primary.0.weight", "lr"] == 0.0125
    for each, schedule in ((step, scheduler), (again, resumed)):
        schedule.step()
        each(torch.ones(4, 6), torch.arange(4))
    assert all(map(torch.equal, step.net.state_dict().values(), again.net.state_dict().values()))


def test_a_plain_checkpoint_converts_both_ways(tmp_path):
    plain = one_process("adamw", BATCHES[:2])
    torch.save({"network": plain.net.state_dict(), "step": plain.state_dict()}, tmp_path / "plain.pt")

    state = torch.load(tmp_path / "plain.pt")
    step = LocalStep(network("auglocal", seed=94), adamw)
    step.net.load_state_dict(state["network"])
    step.load_state_dict(state["step"])
    step.save(tmp_path / "folder")

    back = LocalStep(network("auglocal", seed=93), adamw)
    back.load(tmp_path / "folder")
    assert_states(back, (state["network"], by_name(plain)))
    found, expected = back.state_dict()["optimizer"], state["step"]["optimizer"]
    assert found["param_groups"] == expected["param_groups"] and found["state"].keys() == expected["state"].keys()


def test_momentum_comes_back_beside_gradients_that_are_kept(tmp_path):
    steps = [LocalStep(_linears(6, 6, 4), _sgd, accumulate=2) for _ in range(2)]
    for step in steps:
        step(*_point())
        step(*_point())
    assert all(p.grad is not None for p in steps[1].net.parameters())
    steps[0].save(tmp_path / "saved")
    steps[1].load(tmp_path / "saved")
    assert_states(steps[1], states(steps[0]))


def test_groups_that_no_longer_fit_are_refused(tmp_path):
    step = LocalStep(network("auglocal"), adamw)
    step.save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match="are in one parameter group here, and had other options in the check"):
        LocalStep(network("auglocal"), torch.optim.AdamW).load(tmp_path / "saved")


def test_a_network_on_the_meta_device_waits_for_its_values(tmp_path):
    with torch.device("meta"):
        net = network("contsup")
    with pytest.raises(ValueError, match="on the meta device: call net.materialise"):
        LocalStep(net, sgd)
    tensors = [*net.parameters(), *net.buffers()]
    net.materialise("cpu")
    assert all(a is b and not a.is_meta for a, b in zip(tensors, [*net.parameters(), *net.buffers()], strict=True))
    x, y = BATCHES[0]
    for call in (lambda: net(x), lambda: net(x, y), lambda: LocalStep(net, sgd)(x, y)):
        with pytest.raises(RuntimeError, match="has no values yet: load a checkpoint, or build it inside"):
            call()
    expected = network("contsup")
    with pytest.raises(RuntimeError, match="Missing key"):
        net.load_state_dict({})
    assert net.empty
    net.load_state_dict(expected.state_dict())
    assert torch.equal(net(x), expected(x))

    LocalStep(network(ContSup("R1E")), sgd).save(tmp_path / "saved")
    with torch.device("meta"):
        net = network("contsup")
    net.materialise("cpu")
    LocalStep(net, sgd).load(tmp_path / "saved")
    assert not net.empty

"""Checkpoints in a folder by one process: what is refused, interrupted or converted, and what comes back."""

from __future__ import annotations

import pytest
import torch
from replicated import network, sgd
from test_step_checkpoint import BATCHES, adamw, assert_states, by_name, one_process, states
from torch import nn
from torch.distributed.checkpoint import FileSystemWriter

from auglocal_ext import AugLocal, ContSup, Greedy, LocalSequential, LocalStep, PredSim
from auglocal_ext.distributed import CheckpointError, checkpoint_folder


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
    with pytest.raises(
        CheckpointError, match="holds numbers, strings, .*; got a test_checkpoint_of_one_process.Strange"
    ):
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
                patch.setattr(checkpoint_folder.os, "replace", stop)
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

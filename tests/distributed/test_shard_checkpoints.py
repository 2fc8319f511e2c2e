"""Checkpoints of shards: among replicas, stages and one process, and after processes were killed."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from ranks import run
from replicated import mesh as replicas
from replicated import network, parts, sgd
from test_shards import assert_equal
from test_stages import mesh as grid
from test_step_checkpoint import BATCHES, OPTIMIZERS, by_name, go_on, saved_halfway, train
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from auglocal_ext import LocalStep
from auglocal_ext.distributed import CheckpointError


def _goes_on(shape, folder, name, expected, saved_as=None, **options):
    """Load at this mesh, save what was loaded if asked to, finish the run. All replicas see one batch."""
    rule, optimizer = OPTIMIZERS[name.split()[0]]
    step = LocalStep(network(rule, seed=99), optimizer, mesh=shape, **options)
    train(step, BATCHES[:1])  # state and weights of another run
    assert step.load(folder / name) == {"batches": 3}
    if saved_as is not None:
        step.save(folder / saved_as, {"batches": 3})
    train(step, BATCHES[3:])
    state, of_optimizer = expected[name.split()[0]]
    exactly = shape["replica"].size() in (1, 2) if "replica" in shape.mesh_dim_names else True
    assert_equal(step.net.state_dict(), state, exactly)
    ours = by_name(step)
    assert_equal(ours, {key: of_optimizer[key] for key in ours}, exactly)
    whole_net = network(rule)
    whole_net.load_state_dict(state)
    step.net.eval(), whole_net.eval()
    predicted = step.predict(BATCHES[0][0])
    if predicted is not None:  # by the last stage
        torch.testing.assert_close(predicted, whole_net(BATCHES[0][0]), rtol=1e-9, atol=1e-9)
    step.close()


def _saved_by_two(rank, folder, expected):
    mesh = replicas(2)
    for name in OPTIMIZERS:
        _goes_on(mesh, folder, name, expected, f"{name} shards", shard=True)
        _goes_on(mesh, folder, f"{name} shards", expected)
        _goes_on(grid(2), folder, f"{name} shards", expected, f"{name} stages")
        _goes_on(mesh, folder, f"{name} stages", expected, shard=True)
        rule, optimizer = OPTIMIZERS[name]
        with torch.device("meta"):
            net = network(rule)
        step = LocalStep(net, optimizer, mesh=replicas(2), shard=True)
        step.load(folder / f"{name} shards")
        train(step, BATCHES[3:])
        assert_equal(step.net.state_dict(), expected[name][0], exactly=True)
    with pytest.raises(CheckpointError, match="the rule of the checkpoint is"):
        LocalStep(network("dgl"), sgd, mesh=replicas(2), shard=True).load(folder / "sgd shards")


def _saved_by_four(rank, folder, expected):
    mesh = grid(2, 2)
    three = init_device_mesh("cpu", (3,), mesh_dim_names=("replica",))  # without the last process
    for name in OPTIMIZERS:
        _goes_on(mesh, folder, f"{name} shards", expected, f"{name} grid", shard=True)
        _goes_on(mesh, folder, f"{name} grid", expected)
    for name in OPTIMIZERS if rank < 3 else ():
        _goes_on(three, folder, f"{name} grid", expected, f"{name} three", shard=True)


@pytest.mark.slow
def test_checkpoints_go_among_shards_replicas_stages_and_one_process(tmp_path):
    expected = {name: saved_halfway(tmp_path, name) for name in OPTIMIZERS}
    run(2, _saved_by_two, tmp_path, expected)
    run(4, _saved_by_four, tmp_path, expected)
    for name, (rule, optimizer) in OPTIMIZERS.items():
        for saved in ("shards", "grid", "three"):
            step = LocalStep(network(rule, seed=97), optimizer)
            step.load(tmp_path / f"{name} {saved}")
            train(step, BATCHES[3:])
            assert_equal(step.net.state_dict(), expected[name][0], exactly=True)
            assert_equal(by_name(step), expected[name][1], exactly=True)
    _written_once(tmp_path / "adamw grid")


def _written_once(folder):
    """Chunks of each tensor cover it, and are in the files once."""
    listed = FileSystemReader(next(folder.glob("tensors-*"))).read_metadata()
    tensors = {k: item for k, item in listed.state_dict_metadata.items() if isinstance(item, TensorStorageMetadata)}
    for name, item in tensors.items():
        assert sum(chunk.sizes.numel() for chunk in item.chunks) == item.size.numel(), name
    chunks = [(name, chunk.sizes.numel()) for name, item in tensors.items() for chunk in item.chunks]
    stored = [index.fqn for index in listed.storage_data if index.fqn in tensors]
    assert sorted(stored) == sorted(name for name, size in chunks)
    assert any(len(item.chunks) == 2 for item in tensors.values())


def _until_killed(rank, folder, dies):
    def before(number):
        if dies and (rank, number) == (1, 3):
            os.kill(os.getpid(), signal.SIGKILL)

    step = LocalStep(network("man", seed=95 if folder.exists() else 7), sgd, mesh=replicas(2), shard=True)
    go_on(step, folder, [of_rank[rank] for of_rank in parts(2, 6)], before)
    step.save(folder.with_name("end"))


@pytest.mark.slow
def test_killed_processes_go_on_from_the_last_checkpoint(tmp_path):
    ends = []
    for dies in (True, False):
        folder = tmp_path / str(dies) / "last"
        if dies:
            with pytest.raises((ProcessExitedException, ProcessRaisedException)):
                run(2, _until_killed, folder, True)
        run(2, _until_killed, folder, False)
        step = LocalStep(network("man"), sgd)
        step.load(folder.with_name("end"))
        ends.append(step)
    assert_equal(ends[0].net.state_dict(), ends[1].net.state_dict(), exactly=True)
    assert_equal(by_name(ends[0]), by_name(ends[1]), exactly=True)

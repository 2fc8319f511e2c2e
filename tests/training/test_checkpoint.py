"""A checkpoint is there whole or not at all."""

from __future__ import annotations

import pytest
import torch

from auglocal_ext.training import CheckpointError, checkpoint


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoint.pt"
    state = {
        "weights": {"a": torch.arange(3.0)},
        "epoch": 2,
        "random": checkpoint.random_state(torch.device("cpu")),
    }
    checkpoint.save(state, path)
    loaded = checkpoint.load(path)
    assert loaded["epoch"] == 2 and torch.equal(loaded["weights"]["a"], torch.arange(3.0))
    drawn = torch.rand(4)
    checkpoint.restore_random_state(loaded["random"], torch.device("cpu"))
    assert torch.equal(torch.rand(4), drawn)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


@pytest.mark.parametrize("at", ["torch.save", "os.fsync", "os.replace"])
def test_a_crash_while_writing_leaves_the_old_one(tmp_path, monkeypatch, at):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"epoch": 1}, path)

    def crash(*arguments):
        if at == "torch.save":
            arguments[1].write(b"half a checkpoint")
        raise OSError("no space left on device")

    monkeypatch.setattr(at, crash)
    with pytest.raises(OSError, match="no space left"):
        checkpoint.save({"epoch": 2}, path)
    monkeypatch.undo()
    assert checkpoint.load(path)["epoch"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_missing(tmp_path):
    with pytest.raises(CheckpointError, match="none.pt: no checkpoint to resume from"):
        checkpoint.load(tmp_path / "none.pt")


@pytest.mark.parametrize("keep", [0, 40, 400])
def test_damaged(tmp_path, keep):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"weights": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="checkpoint.pt: not a readable checkpoint"):
        checkpoint.load(path)


def test_other_format(tmp_path):
    path = tmp_path / "weights.pt"
    torch.save({"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(CheckpointError, match="expected a checkpoint of format 6, found None"):
        checkpoint.load(path)
    torch.save({"format": 5, "network": {}}, path)  # its log has the sum of the local losses as train_loss
    with pytest.raises(CheckpointError, match="format 6, found 5: another version wrote it. .* train the run again"):
        checkpoint.load(path)


class Harmful:
    def __reduce__(self):
        return (print, ("executed",))


def test_nothing_in_it_is_executed(tmp_path, capsys):
    path = tmp_path / "checkpoint.pt"
    torch.save(Harmful(), path)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    assert "executed" not in capsys.readouterr().out

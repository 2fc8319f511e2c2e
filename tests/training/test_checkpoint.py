"""A checkpoint is there whole or not at all."""

from __future__ import annotations

import pytest
import torch

from auglocal_ext.training import CheckpointError
from auglocal_ext.training.errors import OutputError
from auglocal_ext.training.run import checkpoint


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
    with pytest.raises(OutputError, match="checkpoint.pt cannot be written: no space left"):
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


def test_a_flipped_bit_is_found(tmp_path):
    """torch.load takes it: one bit of an exponent makes a weight of 1e38."""
    path = tmp_path / "checkpoint.pt"
    checkpoint.save({"weights": torch.full((1000,), 0.5)}, path)
    written = path.read_bytes()
    found = written.index(torch.full((10,), 0.5).numpy().tobytes())
    for at, file in ((found + 2003, "archive/data/0"), (written.index(b"weights") + 2, "archive/data.pkl")):
        damaged = bytearray(written)
        damaged[at] ^= 0x40
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{file} has another checksum than when it was written"):
            checkpoint.load(path)


@pytest.mark.parametrize("state", [[1, 2], {"format": torch.zeros(3)}, {"a": 1}, "text"], ids=str)
def test_no_state_of_a_run(tmp_path, state):
    torch.save(state, tmp_path / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="checkpoint.pt: "):
        checkpoint.load(tmp_path / "checkpoint.pt")


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

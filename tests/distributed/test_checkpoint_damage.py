"""A folder written by ``LocalStep.save``: damage in any of its files is one error, before anything is loaded."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from auglocal_ext import Greedy, LocalSequential, LocalStep
from auglocal_ext.distributed import CheckpointError


def make(seed):
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))
    return LocalStep(LocalSequential(layers, Greedy(), 4, (6,)), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))


@pytest.fixture
def saved(tmp_path):
    step = make(1)
    step(torch.randn(4, 6), torch.arange(4))
    step.save(tmp_path / "saved", {"epoch": 3})
    return tmp_path / "saved"


def refused(folder, said):
    step = make(2)
    before = [p.clone() for p in step.net.parameters()]
    with pytest.raises(CheckpointError, match=f"saved: not a readable checkpoint .*{said}"):
        step.load(folder)
    assert all(map(torch.equal, before, step.net.parameters()))


@pytest.mark.parametrize("pattern", ["*/*.distcp", "*/.metadata", "rest.pt"])
def test_every_byte_counts(saved, pattern):
    (path,) = saved.glob(pattern)
    whole = path.read_bytes()
    start = 0
    if pattern == "rest.pt":  # torch fills up to where the next tensor begins
        start = whole.index(b"checksums")
    for at in (start, len(whole) // 2 if not start else start + 5):
        damaged = bytearray(whole)
        damaged[at] ^= 1
        path.write_bytes(damaged)
        refused(saved, "another checksum than when it was written")
    for kept in (0, len(whole) // 2):
        path.write_bytes(whole[:kept])
        refused(saved, "")
    path.write_bytes(whole)
    assert make(2).load(saved) == {"epoch": 3}


@pytest.mark.parametrize(
    "changes", [{"checksums": 7}, {"checksums": {}}, {"folder": 3}, {"folder": "../elsewhere"}, None], ids=str
)
def test_rest_of_other_kinds(saved, changes):
    rest = torch.load(saved / "rest.pt", weights_only=True)
    torch.save([1] if changes is None else rest | changes, saved / "rest.pt")
    refused(saved, "")


def test_a_folder_of_a_version_without_checksums_is_read_with_a_warning(saved):
    rest = torch.load(saved / "rest.pt", weights_only=True)
    del rest["checksums"]
    torch.save(rest, saved / "rest.pt")
    with pytest.warns(UserWarning, match="saved has no checksums, and is not checked for damage"):
        assert make(2).load(saved) == {"epoch": 3}
    step = make(3)
    step.save(saved, {"epoch": 4})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make(2).load(saved) == {"epoch": 4}

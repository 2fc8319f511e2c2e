"""``deferred``: networks built without memory get the values that their constructors meant, on any split."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from auglocal_ext import MAN, AugLocal, ContSup, Greedy, InfoPro, LocalSequential, PredSim, models
from auglocal_ext.nn import Deferred, deferred


def network(rule, seed=0, materialise=True):
    with deferred(seed):
        net = LocalSequential(models.resnet_cifar(8, width=4), rule, 10, (3, 16, 16))
    assert all(tensor.is_meta for tensor in (*net.parameters(), *net.buffers()))
    if materialise:
        net.materialise("cpu")
    return net


@pytest.mark.parametrize(
    "rule", [AugLocal(2), ContSup("R1E"), InfoPro((0.5, 1.0), (1.0, 0.5)), MAN(), PredSim()], ids=lambda r: r.name
)
def test_values_are_those_of_the_constructors(rule):
    net = network(rule)
    ordinary = LocalSequential(models.resnet_cifar(8, width=4), rule, 10, (3, 16, 16))
    pairs = zip(
        (*net.named_parameters(), *net.named_buffers()),
        (*ordinary.named_parameters(), *ordinary.named_buffers()),
        strict=True,
    )
    for (name, made), (_, expected) in pairs:
        assert (made.shape, made.stride(), made.dtype) == (expected.shape, expected.stride(), expected.dtype)
        if expected.numel() < 2 or expected.float().std() == 0:
            assert torch.equal(made, expected), name
        elif expected.numel() > 500:
            torch.testing.assert_close(made.std(), expected.std(), rtol=0.15, atol=0)
    assert net(torch.randn(4, 3, 16, 16), torch.arange(4)).loss.isfinite()
    if isinstance(rule, MAN):
        auxiliary = net.auxiliary[0]
        for copied in (auxiliary.trained, auxiliary.average):
            assert torch.equal(next(copied.parameters()), next(net.primary[1].parameters()))


def test_values_do_not_depend_on_what_else_is_made_nor_on_the_random_state():
    whole, state = network(AugLocal(2)).state_dict(), torch.get_rng_state()
    for first, last in ((0, 1), (2, 2)):
        torch.randn(5)
        net = network(AugLocal(2), materialise=False)
        net.hold(first, last)
        net.materialise("cpu")
        held = {name: tensor for name, tensor in net.state_dict().items() if not tensor.is_meta}
        assert 0 < len(held) < len(whole)
        assert all(torch.equal(tensor, whole[name]) for name, tensor in held.items())
    other = network(AugLocal(2), seed=1).state_dict()
    assert not torch.equal(other["primary.stem.conv.weight"], whole["primary.stem.conv.weight"])
    torch.set_rng_state(state)
    expected = torch.randn(3)
    torch.set_rng_state(state)
    network(AugLocal(2))
    assert torch.equal(torch.randn(3), expected)


class Odd(nn.Module):
    """Values made in all the ways that leave nothing on the meta device to see."""

    def __init__(self):
        super().__init__()
        self.normal = nn.Parameter(torch.empty(64, 64))
        nn.init.trunc_normal_(self.normal, std=0.1, a=-0.2, b=0.2)
        self.rotation = nn.Parameter(torch.empty(8, 8))
        nn.init.orthogonal_(self.rotation)
        self.table = nn.Embedding(5, 4, padding_idx=2)
        self.register_buffer("mean", torch.tensor([0.5, 0.25]), persistent=False)
        self.register_buffer("steps", torch.arange(6).view(2, 3).t() * 2)
        self.tied = self.rotation
        with torch.no_grad():
            self.table.weight[0] = self.rotation[0, :4]

    def value(self, recorder):
        return {name: recorder.value(t) for name, t in (*self.named_parameters(), *self.named_buffers())}


def test_what_torch_leaves_out_on_the_meta_device_is_made_up_for():
    with deferred(seed=4):
        odd, recorder = Odd(), Deferred.active
    made = odd.value(recorder)
    assert made["normal"].abs().max() <= 0.2 and 0.07 < made["normal"].std() < 0.1
    torch.testing.assert_close(made["rotation"] @ made["rotation"].T, torch.eye(8))
    assert not made["table.weight"][2].any() and torch.equal(made["table.weight"][0], made["rotation"][0, :4])
    assert made["mean"].tolist() == [0.5, 0.25] and made["steps"].tolist() == [[0, 6], [2, 8], [4, 10]]
    assert made["table.weight"].unique().numel() == 17  # all drawn apart


def test_what_cannot_be_made_later_is_refused():
    with pytest.raises(RuntimeError, match="cannot be nested"), deferred(0), deferred(1):
        pass
    assert Deferred.active is None
    with pytest.raises(RuntimeError, match="leave generator= out"), deferred(0):
        torch.empty(3).normal_(generator=torch.Generator())
    net = network(Greedy(), materialise=False).double()
    with pytest.raises(RuntimeError, match="primary.stem.conv.weight was not created inside deferred"):
        net.materialise("cpu")
    assert all(p.is_meta for p in net.parameters())
    with torch.device("meta"):
        net = LocalSequential(models.resnet_cifar(8, width=4), InfoPro((0.5, 1.0), (1.0, 0.5)), 10, (3, 16, 16))
    with pytest.raises(RuntimeError, match="auxiliary.0.terms.0.mean is on the meta device and in no state dict"):
        net.materialise("cpu")


def test_shared_parameters_stay_shared():
    with deferred(0):
        tied = nn.Linear(6, 6)
        layers = nn.Sequential(nn.Linear(6, 6), nn.Sequential(tied, nn.ReLU(), tied), nn.Linear(6, 4))
        net = LocalSequential(layers, Greedy(), 4, (6,))
    twin = copy.deepcopy(net)
    net.materialise("cpu")
    assert net.primary[1][0].weight is net.primary[1][2].weight and not tied.weight.is_meta
    with pytest.raises(RuntimeError, match="was not created inside deferred"):
        twin.materialise("cpu")

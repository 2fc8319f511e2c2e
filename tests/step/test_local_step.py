"""LocalStep on the CPU: the plain loop's weights to the bit, one module's gradients at a time, one optimizer to see."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from step_nets import RULES, assert_same_state, batches, plain_step, small, twins
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from auglocal_ext import AugLocal, LocalSequential
from auglocal_ext.step import LocalStep


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)


def no_decay_groups(net):
    matrices = [p for p in net.parameters() if p.dim() > 1]
    vectors = [p for p in net.parameters() if p.dim() <= 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "lr": 0.05}]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"modules": 1}, {"recompute": "all"}], ids=str)
def test_steps_are_the_plain_loops_to_the_bit(rule, options):
    net, other = twins(rule, **options)
    plain = torch.optim.SGD(other.parameters(), lr=0.1)
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.1))
    before = copy.deepcopy(net.state_dict())
    for x, y in batches(8):
        theirs = plain_step(other, plain, x, y)
        ours = step(x, y)
        for name, value in ours._asdict().items():
            assert torch.equal(value, getattr(theirs, name).detach()), name
            assert not value.requires_grad
    assert_same_state(net, other)
    assert not torch.equal(before["primary.stem.conv.weight"], net.state_dict()["primary.stem.conv.weight"])


OPTIMIZERS = [
    name
    for name in torch.optim.__all__
    if isinstance(getattr(torch.optim, name), type)
    and issubclass(getattr(torch.optim, name), torch.optim.Optimizer)
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon")  # the last takes matrices alone
]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer_of_torch(name):
    make = getattr(torch.optim, name)
    net, other = twins()
    plain = make(other.parameters(), lr=0.01)
    step = LocalStep(net, lambda params: make(params, lr=0.01))
    for x, y in batches(4):
        plain_step(other, plain, x, y)
        step(x, y)
    assert_same_state(net, other)
    assert type(step.optimizer) is make


def test_one_modules_gradients_at_a_time_and_none_afterwards():
    net = small()
    alive = []

    class Watched(torch.optim.SGD):
        def step(self, closure=None):
            alive.append({id(p) for p in net.parameters() if p.grad is not None})
            return super().step(closure)

    step = LocalStep(net, lambda params: Watched(params, lr=0.1))
    step(*next(batches(1)))
    assert alive == [{id(p) for p in module.parameters()} for module in net.local_modules]
    assert len(alive) > 1
    assert all(p.grad is None for p in net.parameters())


def test_groups_schedulers_and_state_are_those_of_one_ordinary_optimizer():
    net, other = twins()
    plain = sgd(no_decay_groups(other))
    step = LocalStep(net, sgd, params=no_decay_groups(net))
    schedules = [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, [0.1, 0.05], total_steps=6),  # moves lr and momentum
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, [lambda e: 0.9**e, lambda e: 0.5**e]),
    ]
    for make in schedules:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of steps in the wrong order
            ours, theirs = make(step.optimizer), make(plain)
            for x, y in batches(5):
                plain_step(other, plain, x, y)
                step(x, y)
                ours.step()
                theirs.step()
        for group, reference in zip(step.optimizer.param_groups, plain.param_groups, strict=True):
            assert {k: v for k, v in group.items() if k != "params"} == {
                k: v for k, v in reference.items() if k != "params"
            }
        assert_same_state(net, other)
    ours, theirs = step.state_dict()["optimizer"], plain.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for key, state in theirs["state"].items():
        assert torch.equal(ours["state"][key]["momentum_buffer"], state["momentum_buffer"])


def test_checkpoints_go_both_ways_between_an_ordinary_optimizer_and_a_step():
    net, other = twins()
    plain, step = sgd(other.parameters()), LocalStep(net, sgd)
    for x, y in batches(3):
        plain_step(other, plain, x, y)
        step(x, y)
    third = copy.deepcopy(net)
    resumed = LocalStep(third, sgd)
    resumed.load_state_dict(copy.deepcopy(step.state_dict()))
    step.load_state_dict({"optimizer": copy.deepcopy(plain.state_dict())})
    plain.load_state_dict(copy.deepcopy(resumed.state_dict()["optimizer"]))
    for x, y in batches(3):
        plain_step(other, plain, x, y)
        step(x, y)
        resumed(x, y)
    assert_same_state(net, other)
    assert_same_state(third, other)


def test_options_that_an_optimizer_writes_into_its_groups():
    class Counting(torch.optim.SGD):
        def step(self, closure=None):
            for group in self.param_groups:
                group["calls"] = group.get("calls", 0) + 1
                group["lr"] = 0.1 / group["calls"]
            return super().step(closure)

    net, other = twins()
    plain = Counting(other.parameters(), lr=1.0)
    step = LocalStep(net, lambda params: Counting(params, lr=1.0))
    for x, y in batches(4):
        plain_step(other, plain, x, y)
        step(x, y)
        assert step.optimizer.param_groups[0]["calls"] == plain.param_groups[0]["calls"]
    assert_same_state(net, other)


def test_a_learning_rate_set_by_hand():
    net, other = twins()
    plain, step = sgd(other.parameters()), LocalStep(net, sgd)
    for lr, (x, y) in zip((0.1, 0.01, 0.0), batches(3), strict=True):
        plain.param_groups[0]["lr"] = step.optimizer.param_groups[0]["lr"] = lr
        plain_step(other, plain, x, y)
        step(x, y)
    assert_same_state(net, other)


def test_clipping_of_each_module_by_itself():
    net, other = twins()
    plain, step = sgd(other.parameters()), LocalStep(net, sgd, clip_norm=0.1)
    for x, y in batches(3):
        out = other(x, y)
        plain.zero_grad()
        out.loss.backward()
        for module in other.local_modules:
            assert nn.utils.clip_grad_norm_(list(module.parameters()), 0.1) > 0.1
        plain.step()
        step(x, y)
    assert_same_state(net, other)


def test_clipping_of_all_modules_together():
    net, other = twins()
    plain, step = sgd(other.parameters()), LocalStep(net, sgd, clip_norm=0.1, clip="global")
    for x, y in batches(3):
        out = other(x, y)
        plain.zero_grad()
        out.loss.backward()
        assert nn.utils.clip_grad_norm_(list(other.parameters()), 0.1) > 0.1
        plain.step()
        step(x, y)
    assert_same_state(net, other)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("calls", [2, 3])
def test_gradients_of_several_calls_are_averaged(calls):
    net, other = twins()
    plain, step = sgd(other.parameters()), LocalStep(net, sgd, accumulate=calls)
    for _ in range(2):
        plain.zero_grad()
        for x, y in batches(calls):
            (other(x, y).loss / calls).backward()
            step(x, y)
        plain.step()
    for (name, value), (_, theirs) in zip(net.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(value, theirs, msg=name)
    weights = copy.deepcopy(list(net.parameters()))
    for _ in range(calls - 1):
        step(x, y)
    assert all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))  # no step is due
    step(x, y)
    assert not all(torch.equal(a, b) for a, b in zip(weights, net.parameters(), strict=True))


def test_gradients_left_by_another_pass_are_not_added():
    net, other = twins()
    plain, step = sgd(other.parameters()), LocalStep(net, sgd)
    for x, y in batches(2):
        running = {k: v.clone() for k, v in net.named_buffers()}
        net(x, y).loss.backward()
        for name, value in net.named_buffers():
            value.copy_(running[name])
        plain_step(other, plain, x, y)
        step(x, y)
        assert_same_state(net, other)


def test_an_accumulation_drops_what_was_left_and_keeps_its_buffers():
    net, other = twins()
    plain, step = sgd(other.parameters()), LocalStep(net, sgd, accumulate=2)
    places = []
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)  # left by another pass
    for _ in range(2):
        plain.zero_grad()
        for x, y in batches(2):
            (other(x, y).loss / 2).backward()
            step(x, y)
        plain.step()
        places.append([p.grad.data_ptr() for p in net.parameters() if p.grad is not None])
    for (name, value), (_, theirs) in zip(net.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(value, theirs, msg=name)
    assert places[0] and places[0] == places[1]  # a captured step adds to them at one address


def test_a_parameter_shared_by_two_modules_is_stepped_once_with_both_gradients():
    def build():
        torch.manual_seed(3)
        shared = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        layers = nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.Sequential(shared, nn.ReLU()),
            nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()),
            nn.Sequential(shared, nn.ReLU()),
            nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10)),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return LocalSequential(layers, AugLocal(1, pyramid=0.0), 10, (3, 16, 16))

    net, other = build(), build()
    plain, step = sgd(other.parameters()), LocalStep(net, sgd)
    for x, y in batches(3):
        plain_step(other, plain, x, y)
        step(x, y)
    assert_same_state(net, other)


def test_a_parameter_that_the_optimizer_does_not_hold_stays_and_those_behind_it_are_stepped():
    net, other = twins()
    ours, theirs = ([p for i, p in enumerate(n.parameters()) if i > 0] for n in (net, other))
    plain, step = sgd(theirs), LocalStep(net, sgd, params=ours)
    for x, y in batches(2):
        plain_step(other, plain, x, y)
        step(x, y)
    assert_same_state(net, other)


def test_frozen_parameters_stay():
    net, other = twins()
    for n in (net, other):
        for p in n.local_modules[1].parameters():
            p.requires_grad_(False)
    plain, step = sgd(other.parameters()), LocalStep(net, sgd)
    for x, y in batches(3):
        plain_step(other, plain, x, y)
        step(x, y)
    assert_same_state(net, other)


def test_hooks_on_parameters_run_once_per_step():
    net = small()
    calls = []
    next(net.parameters()).register_hook(lambda g: calls.append(1))
    step = LocalStep(net, sgd)
    for x, y in batches(3):
        step(x, y)
    assert len(calls) == 3


class HostReads(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"autocast": torch.bfloat16}, {"clip_norm": 1.0}, {"accumulate": 2}], ids=str)
def test_no_value_is_read_on_the_host(options, monkeypatch):
    """On a GPU each such read waits for the device. Labels are looked at on the CPU, where that costs nothing."""
    monkeypatch.setattr("auglocal_ext.tasks.base.check_values", lambda *_: None)
    step = LocalStep(small(), sgd, **options)
    for x, y in batches(4):
        with HostReads() as reads:
            step(x, y)
    assert reads.count == 0
    with HostReads() as reads:
        torch.ones(()).item()
    assert reads.count == 1


def test_the_cpu_runs_eagerly_and_says_why():
    step = LocalStep(small(), sgd)
    step(*next(batches(1)))
    assert not step.graphed and "cpu" in step.eager_reason
    step = LocalStep(small(), sgd, graph=False)
    step(*next(batches(1)))
    assert step.eager_reason == "graph=False"
    with pytest.raises(RuntimeError, match='graph="auto"'):
        LocalStep(small(), sgd, graph=True)(*next(batches(1)))


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"graph": "yes"}, ValueError, "graph must be"),
        ({"overlap": 3}, ValueError, "overlap must be"),
        ({"autocast": torch.float32}, ValueError, "autocast must be"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm must be positive"),
        ({"clip_norm": -1.0}, ValueError, "clip_norm must be positive"),
        ({"clip_norm": float("nan")}, ValueError, "clip_norm must be positive"),
        ({"clip_norm": 1.0, "clip": "all"}, ValueError, "clip must be one of"),
        ({"accumulate": 0}, ValueError, "accumulate"),
        ({"accumulate": True}, ValueError, "accumulate"),
        ({"recompute": "some"}, ValueError, "recompute"),
    ],
    ids=str,
)
def test_bad_options(options, error, text):
    with pytest.raises(error, match=text):
        LocalStep(small(), sgd, **options)


def test_bad_networks_and_optimizers():
    net = small()
    with pytest.raises(TypeError, match="LocalSequential"):
        LocalStep(net.primary, sgd)
    with pytest.raises(TypeError, match="function of the parameters"):
        LocalStep(net, lambda params: None)
    with pytest.raises(ValueError, match="LBFGS"):
        LocalStep(net, torch.optim.LBFGS)
    with pytest.raises(ValueError, match="no local module trains"):
        LocalStep(net, sgd, params=[nn.Parameter(torch.zeros(3))])


def test_a_bad_batch_changes_nothing():
    net = small()
    step = LocalStep(net, sgd)
    x, y = next(batches(1))
    step(x, y)
    before = copy.deepcopy(net.state_dict())
    for bad in ((x, y + 10), (x, y.float()), (x[:, :2], y), (x[:3], y), (x.long(), y)):
        with pytest.raises((TypeError, ValueError)):
            step(*bad)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name
    step(x, y)


@pytest.mark.parametrize("extra", [[1, 2], "epoch"])
def test_what_is_saved_besides_is_a_dict(extra, tmp_path):
    step = LocalStep(small(), sgd)
    with pytest.raises(TypeError, match=f"extra is a dict .* got {type(extra).__name__}"):
        step.save(tmp_path / "run", extra=extra)
    assert not list(tmp_path.iterdir())

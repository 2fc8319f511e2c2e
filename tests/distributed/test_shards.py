"""``LocalStep(shard=True)`` on real processes: shards come to what whole replicas come to."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from language import tokens
from ranks import run
from replicated import RULES, network, parts, sgd
from replicated import mesh as replicas
from test_edges import ReadoutRule, language_model
from test_replicas import Skipping
from test_stages import mesh as grid
from test_step_checkpoint import BATCHES, adamw, by_name, train
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from auglocal_ext import SOLO, Greedy, LocalSequential, LocalStep, models
from auglocal_ext.distributed import DisagreementError, Shards
from auglocal_ext.nn import deferred


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def assert_equal(ours, theirs, exactly):
    """States of networks or optimizers, of which ours may be sharded."""
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        if not isinstance(value, torch.Tensor):
            assert value == theirs[key], key
        elif not value.is_meta:
            tolerance = 0.0 if exactly else 1e-10
            torch.testing.assert_close(
                whole(value), whole(theirs[key]), rtol=tolerance, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
            )


def _alike(rank, names, world, options, exactly=True, make=network):
    """Sharded and whole replicas take the same steps. With three the order of sums, and so rounding, differs."""
    for name in names:
        sharded, plain = (make(name, seed=7 + rank) for _ in range(2))
        steps = [
            LocalStep(net, sgd, mesh=replicas(world), shard=shard, **options)
            for net, shard in ((sharded, True), (plain, False))
        ]
        assert all(isinstance(p, DTensor) for p in sharded.parameters())
        for batch in parts(world, 3 * options.get("accumulate", 1)):
            outs = [step(*batch[rank]) for step in steps]
        assert torch.equal(outs[0].module_losses, outs[1].module_losses) or not exactly
        assert_equal(sharded.state_dict(), plain.state_dict(), exactly)
        assert_equal(by_name(steps[0]), by_name(steps[1]), exactly)
        x = batch[rank][0]
        sharded.eval(), plain.eval()
        torch.testing.assert_close(steps[0].predict(x), plain(x), rtol=1e-9, atol=1e-9)
        assert all(isinstance(p, DTensor) for p in sharded.parameters())


def _languages(rank):
    """SOLO with a readout of its own."""
    for readout in ("private", "random"):
        states = []
        for shard in (True, False):
            net = language_model(SOLO(1, readout=readout))
            step = LocalStep(net, sgd, mesh=replicas(2), shard=shard)
            for u in range(3):
                step(*tokens(seed=2 * u + rank))
            states.append(net.state_dict())
        assert_equal(*states, exactly=True)


OPTIONS = {
    "global clip": {"clip_norm": 0.01, "clip": "global"},
    "module clip": {"clip_norm": 0.01},
    "accumulate": {"accumulate": 2},
    "recompute": {"recompute": "all"},
    "synced": {"sync_batch_norm": True},
    "autocast": {"autocast": torch.bfloat16},
}


def _two(rank):
    _alike(rank, ["man"], 2, {})
    _memory(rank)
    _refused(rank)


def _more(rank):
    for work in (_plain_states, _chains, _overflow, _from_nothing, _disagreements, _languages):
        torch.manual_seed(0)
        work(rank)
    _breaks_off(rank)


def test_two_processes():
    run(2, _two)


@pytest.mark.slow
def test_two_processes_in_other_cases():
    run(2, _more)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_every_rule(world):
    run(world, _alike, list(RULES), world, {}, world == 2)


def _grid(rank):
    """Two stages of two replicas, sharded and whole, with a delay between the stages; MAN reads across the cut."""
    mesh = grid(2, 2)
    for rule in ("contsup", "man"):
        states = []
        for shard in (True, False):
            net = network(rule)
            step = LocalStep(net, sgd, mesh=mesh, stage_cuts=(1,), delay=1, shard=shard)
            for batch in parts(2, 4):
                step(*batch[rank % 2])
            step.close()
            states.append(net.state_dict())
        assert_equal(*states, exactly=True)
    with pytest.raises(ValueError, match="reads parameters of stage 1 as they were some steps ago, and of shards only"):
        LocalStep(network(ReadoutRule()), sgd, mesh=mesh, stage_cuts=(1,), shard=True)


@pytest.mark.slow
def test_stages_with_a_delay():
    run(4, _grid)


def _each_option(rank, world):
    _alike(rank, ["predsim", "contrast"], world, {"gather_features": True, "sync_batch_norm": True}, world == 2)
    for options in OPTIONS.values():
        exactly = world == 2 and options.keys() & {"clip_norm", "accumulate"} == set()
        _alike(rank, ["auglocal", "man"], world, options, exactly)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_every_option(world):
    run(world, _each_option, world)


def held_bytes(tensors):
    """Bytes of the storages behind tensors, each once; of DTensors the local ones."""
    local = [t.detach().to_local() if isinstance(t, DTensor) else t.detach() for t in tensors]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in local}.values())


def _memory(rank):
    """While a module runs, its own parameters are whole and no others; optimizer state is a half."""
    net = network("auglocal")
    modules = net.local_modules
    sizes = [sum(p.numel() * p.element_size() for p in module.parameters()) for module in modules]
    step = LocalStep(net, sgd, mesh=replicas(2), shard=True)
    at_rest = [held_bytes(module.parameters()) for module in modules]
    seen = []

    def look(*_):
        seen.append([held_bytes(module.parameters()) for module in modules])

    def look_in_backward(layer, args, out):
        out.register_hook(look)

    for module in modules:
        module.layers[0].register_forward_pre_hook(look)
        module.layers[-1].register_forward_hook(look_in_backward)
    (batch,) = parts(2, 1)
    step(*batch[rank])
    assert len(seen) == 2 * len(modules)
    for index in range(len(modules)):
        for held in seen[2 * index : 2 * index + 2]:
            assert held == [sizes[k] if k == index else at_rest[k] for k in range(len(modules))], index
    assert [held_bytes(module.parameters()) for module in modules] == at_rest
    # Each shard has at most a row more than its half.
    rows = sum(p[:1].numel() for p in net.parameters()) * 8
    for held in (sum(at_rest), held_bytes(t for s in step.optimizer.state.values() for t in s.values())):
        assert abs(held - sum(sizes) / 2) <= rows / 2
    assert all(p.grad is None for p in net.parameters())


def _refused(rank):
    net = network("greedy")
    step = LocalStep(net, sgd, mesh=replicas(2), shard=True)
    x, y = next(parts(1))[0]
    with torch.inference_mode():
        step.predict(x)
    step(x, y)  # trains with parameters that were gathered in inference mode
    for call in (lambda: net(x), lambda: net(x, y)):
        with pytest.raises(RuntimeError, match="holds shards of the network: train by step"):
            call()
    with pytest.raises(RuntimeError, match=r"export\(\) copies all weights, and this process holds shards"):
        net.export()
    with pytest.raises(RuntimeError, match="another LocalStep has sharded this network"):
        LocalStep(net, sgd, mesh=replicas(2))
    for optimizer in (lambda p: torch.optim.SGD(p, lr=0.1, fused=True), torch.optim.Adafactor):
        with pytest.raises(ValueError, match="cannot step sharded parameters with these options"):
            LocalStep(network("greedy"), optimizer, mesh=replicas(2), shard=True)
    with pytest.raises(DisagreementError, match="replicas 0 and 1 differ in shard: True and False"):
        LocalStep(network("greedy"), sgd, mesh=replicas(2), shard=rank == 0)
    with pytest.raises(DisagreementError, match="differ in clip_norm: None and 1.0"):
        LocalStep(network("greedy"), sgd, mesh=replicas(2), shard=True, clip_norm=1.0 if rank else None)
    handle = next(net.parameters()).register_hook(lambda g: g)
    with pytest.raises(RuntimeError, match="conv.weight is sharded, and a hook of its gradient would not run"):
        step(x, y)
    handle.remove()


def _plain_states(rank):
    """States of an ordinary network and optimizer are sharded when they are loaded."""
    plain = LocalStep(network("auglocal"), adamw, mesh=replicas(2))
    train(plain, BATCHES[:2])
    step = LocalStep(network("auglocal", seed=94), adamw, mesh=replicas(2), shard=True)
    step.net.load_state_dict(copy.deepcopy(plain.net.state_dict()))
    step.load_state_dict(copy.deepcopy(plain.state_dict()))
    for each in (plain, step):
        train(each, BATCHES[2:4])
    assert_equal(step.net.state_dict(), plain.net.state_dict(), exactly=True)
    assert_equal(by_name(step), by_name(plain), exactly=True)
    step.net.load_state_dict(copy.deepcopy(step.net.state_dict()))
    step.load_state_dict(copy.deepcopy(step.state_dict()))
    assert_equal(by_name(step), by_name(plain), exactly=True)


class Ops(TorchDispatchMode):
    """Names of the library's own ops that have run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "auglocal_ext":
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def _chains(rank):
    """Layers of sharded modules keep their classes and run fused."""
    x, y = next(parts(2, 1))[rank]
    seen = []
    for shard in (True, False):
        net = network("auglocal")
        kinds = [type(layer) for layer in net.modules()]
        step = LocalStep(net, sgd, mesh=replicas(2), shard=shard)
        assert [type(layer) for layer in net.modules()] == kinds
        with Ops() as ops:
            step(x, y)
        seen.append(ops.seen)
    assert seen[0] == seen[1] and len(seen[0]) > 10


def _overflow(rank):
    """An infinite gradient in one process skips its module in all, and all scalers halve."""
    net = LocalSequential(models.resnet_cifar(8, width=4), Greedy(), 10, (3, 16, 16))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    step = LocalStep(net, sgd, mesh=replicas(2), shard=True, grad_scaler=scaler, clip_norm=0.1)
    x, y = torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))
    modules = net.local_modules
    before = [[whole(p).clone() for p in module.parameters()] for module in modules]

    def poison(layer, args, out):
        out.register_hook(lambda g: g * float("inf"))

    handle = modules[1].layers[-1].register_forward_hook(poison) if rank == 1 else None
    step(x, y)
    assert scaler.get_scale() == 4.0
    for index, module in enumerate(modules):
        moved = any(not torch.equal(whole(p), old) for p, old in zip(module.parameters(), before[index], strict=True))
        assert moved == (index != 1), index
    if handle is not None:
        handle.remove()
    step(x, y)
    assert any(not torch.equal(whole(p), q) for p, q in zip(modules[1].parameters(), before[1], strict=True))


def _live_bytes():
    """Of all tensors on the CPU, each storage once."""
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and t.device.type == "cpu"]
    return held_bytes(tensors)


def _from_nothing(rank):
    """Of a deferred network a process has a module's memory at a time, besides its shards."""
    with deferred(seed=3):
        net = network("auglocal")
    with deferred(seed=3):
        expected = network("auglocal")
    sizes = [sum(p.numel() * p.element_size() for p in module.parameters()) for module in net.local_modules]
    buffers = sum(b.numel() * b.element_size() for b in net.buffers())
    gc.collect()
    base, seen, shard = _live_bytes(), [], Shards.shard

    def look(*args):
        seen.append(_live_bytes() - base - sum(sizes) // 2)
        shard(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Shards, "shard", look)
        step = LocalStep(net, adamw, mesh=replicas(2), shard=True)
    rows = sum(p[:1].numel() for p in net.parameters()) * 8
    assert len(seen) == len(sizes)
    assert all(0 < live + sum(sizes) // 2 and live <= sizes[k] + buffers + rows for k, live in enumerate(seen))
    gc.collect()
    assert _live_bytes() - base <= sum(sizes) / 2 + buffers + rows
    expected.materialise("cpu")
    assert_equal(net.state_dict(), expected.state_dict(), exactly=True)
    step(*BATCHES[0])
    with torch.device("meta"):
        empty = network("auglocal")
    step = LocalStep(empty, adamw, mesh=replicas(2), shard=True)
    with pytest.raises(RuntimeError, match="no values yet: load a checkpoint"):
        step(*BATCHES[0])
    with pytest.raises(RuntimeError, match="no values yet: load a checkpoint"):
        step.predict(BATCHES[0][0])


def _disagreements(rank):
    """Other parameters with a gradient than before, or than in the other process, are refused in words."""
    net = LocalSequential(nn.Sequential(nn.Linear(6, 6), Skipping(), nn.Linear(6, 3)), Greedy(), 3, (6,))
    step = LocalStep(net, sgd, mesh=replicas(2), shard=True)
    batch = torch.randn(4, 6), torch.randint(0, 3, (4,))
    step(*batch)
    net.primary[1].skip = True
    with pytest.raises(DisagreementError, match=r"other parameters than in its first step: primary\.1\.layer\.bias, "):
        step(*batch)
    with pytest.raises(RuntimeError, match="a step of this process broke off with DisagreementError"):
        step(*batch)


def _breaks_off(rank):
    step = LocalStep(network("greedy"), sgd, mesh=replicas(2), shard=True)
    x, y = next(parts(1))[0]
    step(x, y)
    if rank == 0:
        with pytest.raises(RuntimeError, match=r"module 0 were not (gathered|averaged) \(this is rank 0, batch 1\)"):
            step(x, y)
            step(x, y)


class Mixed(nn.Module):
    """A layer in bf16 among others, odd sizes, one number, a parameter that is not used, a frozen one."""

    def __init__(self):
        super().__init__()
        self.narrow = nn.Linear(6, 7).bfloat16()
        self.one, self.unused = nn.Linear(7, 1), nn.Parameter(torch.zeros(3))
        self.frozen = nn.Linear(1, 5).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.one(self.narrow(x.bfloat16()).float()))


def _odd_network(seed):
    torch.manual_seed(seed)
    tied = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    tied[2].weight = tied[0].weight
    still = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5, affine=False)).requires_grad_(False)
    layers = nn.Sequential(Mixed(), tied, still, nn.Linear(5, 5), nn.Linear(5, 4))
    net = LocalSequential(layers, Greedy("0c2f"), 4, (6,), fused=False)
    net.auxiliary[2].requires_grad_(False)  # nothing of this module is trained
    return net


def _odd(rank, world):
    sharded, plain = _odd_network(7 + rank), _odd_network(7 + rank)
    trained = [net.primary for net in (sharded, plain)]  # gradients of the auxiliary networks are dropped
    steps = [
        LocalStep(net, sgd, mesh=replicas(world), shard=shard, params=primary.parameters(), clip_norm=0.5)
        for net, shard, primary in ((sharded, True, trained[0]), (plain, False, trained[1]))
    ]
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        x, y = torch.randn(5, 6, generator=generator), torch.randint(0, 4, (5,), generator=generator)
        for step in steps:
            step(x, y)
    for (name, value), theirs in zip(sharded.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(whole(value), theirs, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
    assert by_name(steps[0]).keys() == by_name(steps[1]).keys()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_odd_parameters(world):
    """Of float32 and bf16, so the rounding of clipping is within 1e-5."""
    run(world, _odd, world)

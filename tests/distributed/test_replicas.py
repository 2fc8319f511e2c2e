"""``LocalStep(mesh=...)`` on real processes: several replicas come to what one process comes to."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import run
from replicated import (
    COMPARING,
    RULES,
    STEPS,
    assert_close,
    everyone_agrees,
    mesh,
    network,
    one_process,
    parts,
    sgd,
    whole_batch,
)
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from auglocal_ext import Greedy, LocalSequential, LocalStep, models
from auglocal_ext.distributed import DisagreementError
from auglocal_ext.nn import BatchNormAct2d, sync_batch_norm, synced_statistics
from auglocal_ext.ops import batch_norm_act
from auglocal_ext.planning import plan_memory


def _train(rank, wanted, world, options):
    for name, state in wanted.items():
        net = network(name, seed=7 + rank)  # the first replica's weights are taken
        step = LocalStep(net, sgd, mesh=mesh(world), **options)
        for batch in parts(world, STEPS * options.get("accumulate", 1)):
            out = step(*batch[rank])
            assert not out.loss.requires_grad
        assert all(p.grad is None or not p.grad.any() for p in net.parameters())
        everyone_agrees(net)
        assert_close(net, state)
        assert step.eager_reason == "steps of several processes run eagerly"


def _train_all(names, world, clip_norm=None, **options):
    wanted = {name: one_process(network(name), world, clip_norm, options.get("accumulate", 1)) for name in names}
    options |= {} if clip_norm is None else {"clip_norm": clip_norm, "clip": "global"}
    run(world, _train, {name: net.state_dict() for name, net in wanted.items()}, world, options)


def test_two_replicas_come_to_what_one_process_does():
    _train_all(["auglocal", "man"], 2)


@pytest.mark.slow
def test_every_rule_with_every_option():
    """Without options, and in two replicas, they are in test_matrix.py."""
    _train_all(["auglocal", "man", "predsim"], 2, clip_norm=0.01)
    _train_all(["auglocal", "man", "predsim"], 2, accumulate=2)
    _train_all(list(RULES), 3, clip_norm=0.01, accumulate=2)


class Stem(nn.Module):
    """A layer whose BatchNorm runs eagerly, with a cumulative average."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4, momentum=None)
        self.act = BatchNormAct2d(4, activation="leaky_relu")

    def forward(self, x):
        h = self.norm(self.conv(x))
        return self.act(h, h)


def odd_layers():
    torch.manual_seed(7)
    pooled = [nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    layers = nn.Sequential(Stem(), nn.Sequential(*pooled), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
    return LocalSequential(layers, Greedy(), 10, (3, 16, 16)).double()


SYNCED = {
    **{name: lambda name=name, **options: network(name, **options) for name in ("auglocal", "contsup", "dgl", "man")},
    **{name: lambda name=name, **options: network(COMPARING[name], **options) for name in COMPARING},
    "odd layers": lambda **_: odd_layers(),
}


def _train_synced(rank, names, world, options, sizes=None):
    for name in names:
        net = SYNCED[name]()
        step = LocalStep(net, sgd, mesh=mesh(world), sync_batch_norm=True, **options)
        for batch in parts(world, sizes=sizes):
            step(*batch[rank])
        everyone_agrees(net)
        expected = whole_batch(SYNCED[name](), world, sizes)
        for (key, value), theirs in zip(net.state_dict().items(), expected.state_dict().values(), strict=True):
            torch.testing.assert_close(value, theirs, rtol=1e-8, atol=1e-8, msg=lambda m, key=key: f"{key}: {m}")
        x = next(parts(world))[0][0]
        assert torch.equal(net.eval()(x), copy.deepcopy(net)(x))  # outside a step it needs no other process


@pytest.mark.slow
def test_synchronised_batch_norm_sees_the_whole_batch():
    run(2, _train_synced, ["auglocal", "odd layers"], 2, {"recompute": "all"})


@pytest.mark.slow
def test_every_rule_with_synchronised_batch_norm():
    run(3, _train_synced, [name for name in SYNCED if name not in COMPARING], 3, {})


@pytest.mark.slow
def test_losses_that_compare_samples_see_the_whole_batch():
    run(2, _train_gathered)


def _train_gathered(rank):
    gather = {"gather_features": True}
    _train_synced(rank, list(COMPARING), 2, gather)
    _train_synced(rank, ["predsim", "contrast"], 2, gather | {"recompute": "all"})
    _train_synced(rank, ["predsim alone"], 2, gather, sizes=[5, 2])  # other losses count replicas alike
    net = network("predsim")
    step = LocalStep(net, sgd, mesh=mesh(2))
    losses = step(*next(parts(2))[rank]).module_losses.clone()
    torch.distributed.broadcast(losses, 0)
    alone = network("predsim")(*next(parts(2))[0]).module_losses
    torch.testing.assert_close(losses, alone)  # without the request a part is compared by itself
    with pytest.raises(ValueError, match="gather_features=True is for losses that compare .*AugLocal.* has none"):
        LocalStep(network("auglocal"), sgd, mesh=mesh(2), gather_features=True)
    if rank == 0:
        step = LocalStep(network("predsim"), sgd, mesh=mesh(2), gather_features=True)
        with pytest.raises(RuntimeError, match=r"were not exchanged \(this is rank 0, batch 1\)"):
            for _ in range(2):
                step(*next(parts(2))[rank])
    else:
        LocalStep(network("predsim"), sgd, mesh=mesh(2), gather_features=True)(*next(parts(2))[rank])


def test_synchronised_batch_norm_is_refused_where_it_cannot_be():
    with pytest.raises(ValueError, match="sync_batch_norm=True is for several replicas"):
        LocalStep(network(), sgd, sync_batch_norm=True)
    with pytest.raises(ValueError, match="gather_features=True is for several replicas"):
        LocalStep(network(), sgd, gather_features=True)
    with pytest.raises(ValueError, match="1 is of type SyncBatchNorm, .*cannot be merged"):
        sync_batch_norm(nn.Sequential(nn.Linear(2, 2), nn.SyncBatchNorm(2)))
    layers = nn.Sequential(nn.BatchNorm2d(3), nn.Identity())
    assert sync_batch_norm(layers) == sync_batch_norm(layers) == 1
    x = torch.randn(4, 3, 2, 2)
    with synced_statistics(None):
        with pytest.raises(NotImplementedError, match="F.batch_norm takes the statistics of this process alone"):
            nn.functional.batch_norm(x, None, None, training=True)
        with pytest.raises(NotImplementedError, match="batch_norm_act takes the statistics of this process alone"):
            batch_norm_act(x, None, None, None, None, training=True)
        with pytest.raises(RuntimeError, match="cannot merge its statistics .* empty batch"):
            layers(x[:0])


def _overflow(rank):
    """An infinite gradient in one replica skips the module's update in all, and all scalers halve."""
    net = LocalSequential(models.resnet_cifar(8, width=4), Greedy(), 10, (3, 16, 16))
    step = LocalStep(net, sgd, mesh=mesh(2), grad_scaler=torch.amp.GradScaler("cpu", init_scale=8.0))
    x, y = torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))
    before = [[p.detach().clone() for p in module.parameters()] for module in net.local_modules]
    poisoned = next(p for p in net.local_modules[1].parameters() if p.requires_grad)
    handle = poisoned.register_hook(lambda g: g * float("inf")) if rank == 1 else None
    step(x, y)
    assert step.grad_scaler.get_scale() == 4.0
    for index, module in enumerate(net.local_modules):
        moved = any(not torch.equal(p, old) for p, old in zip(module.parameters(), before[index], strict=True))
        assert moved == (index != 1), index
    everyone_agrees(net)
    if handle is not None:
        handle.remove()
    net(x, y).loss.backward()
    with pytest.raises(RuntimeError, match="this replica's alone"):
        step.optimizer.step()
    step(x, y)
    assert any(not torch.equal(p, q) for p, q in zip(net.local_modules[1].parameters(), before[1], strict=True))
    everyone_agrees(net)


def _memory_formats(rank):
    """Gradients keep the layout of their parameters, so that fused optimizers take them as they are."""
    net = network("greedy").to(memory_format=torch.channels_last)
    step = LocalStep(net, sgd, mesh=mesh(2), clip_norm=1.0, clip="global")
    strides = {}
    clip = nn.utils.clip_grad_norm_

    def seen(parameters, norm):
        strides.update({p: (p.grad.stride(), p.stride()) for p in parameters})
        return clip(parameters, norm)

    nn.utils.clip_grad_norm_ = seen
    try:
        step(*next(parts(2))[rank])
    finally:
        nn.utils.clip_grad_norm_ = clip
    assert len(strides) == len(list(net.parameters()))
    assert all(ours == theirs for ours, theirs in strides.values())


def _resume(rank):
    """State of a step goes on in another, in all replicas."""
    net = network("man")
    step = LocalStep(net, sgd, mesh=mesh(2))
    batches = list(parts(2))
    for batch in batches[:2]:
        step(*batch[rank])
    again = network("man", seed=rank)
    again.load_state_dict(net.state_dict())
    other = LocalStep(again, sgd, mesh=mesh(2))
    other.load_state_dict(copy.deepcopy(step.state_dict()))
    for batch in batches[2:]:
        step(*batch[rank])
        other(*batch[rank])
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


class Skipping(nn.Module):
    """Leaves its layer out when it is told to."""

    def __init__(self):
        super().__init__()
        self.layer, self.out, self.skip = nn.Linear(6, 6), nn.Linear(6, 6), False

    def forward(self, x):
        return self.out(x if self.skip else self.layer(x))


def _disagreements(rank):
    """Whatever differs is refused in both processes, by name."""
    one_layer_more = models.resnet_cifar(14 if rank else 8, width=4)
    with pytest.raises(DisagreementError, match="replicas 0 and 1 differ in the cuts"):
        LocalStep(LocalSequential(one_layer_more, Greedy(), 10, (3, 16, 16)), sgd, mesh=mesh(2))
    wider = LocalSequential(models.resnet_cifar(8, width=4 + 4 * rank), Greedy(), 10, (3, 16, 16))
    with pytest.raises(
        DisagreementError, match=r"differ in primary.*: float32 \[4, 3, 3, 3\] and float32 \[8, 3, 3, 3\]"
    ):
        LocalStep(wider, sgd, mesh=mesh(2))
    with pytest.raises(DisagreementError, match="differ in the rule: .*AugLocal.*MAN"):
        LocalStep(network("man" if rank else "auglocal"), sgd, mesh=mesh(2))
    with pytest.raises(DisagreementError, match="differ in the optimizer: SGD .*'lr': 0.1.* and SGD .*'lr': 0.2"):
        LocalStep(network(), lambda p: torch.optim.SGD(p, lr=0.1 * (rank + 1)), mesh=mesh(2))
    with pytest.raises(DisagreementError, match="differ in clip_norm: None and 1.0"):
        LocalStep(network(), sgd, mesh=mesh(2), clip_norm=1.0 if rank else None)
    layers = nn.Sequential(nn.Linear(6, 6), Skipping(), nn.Linear(6, 3))
    net = LocalSequential(layers, Greedy(), 3, (6,))
    step = LocalStep(net, sgd, mesh=mesh(2))
    step(torch.randn(4, 6), torch.randint(0, 3, (4,)))
    net.primary[1].skip = True
    with pytest.raises(DisagreementError, match=r"other parameters than in its first step: primary\.1\.layer\.bias, "):
        step(torch.randn(4, 6), torch.randint(0, 3, (4,)))


def _all_of(rank, works):
    for work in works:
        torch.manual_seed(0)
        work(rank)


@pytest.mark.slow
def test_two_replicas_in_odd_cases():
    run(2, _all_of, [_overflow, _memory_formats, _resume, _disagreements])


@pytest.fixture
def lonely(request):
    """A process group of the asked size whose other processes are not there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=request.param, store=FakeStore())
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("lonely", [2], indirect=True)
@pytest.mark.parametrize(
    ("shape", "names", "message"),
    [
        ((2,), None, "must be named .*got no names: pass mesh_dim_names="),
        ((2,), ("data",), r"must be named .*got \('data',\)"),
        ((1, 2), ("replica", "stage"), "in this order; got"),
    ],
)
def test_meshes_that_are_not_understood_are_refused(lonely, shape, names, message):
    with pytest.raises(ValueError, match=message):
        LocalStep(network(), sgd, mesh=init_device_mesh("cpu", shape, mesh_dim_names=names))


@pytest.mark.parametrize("lonely", [2], indirect=True)
@pytest.mark.parametrize("name", ["stage", "replica"])
def test_a_network_on_another_device_than_the_mesh_is_refused(lonely, name):
    cuda = init_device_mesh("cuda", (2,), mesh_dim_names=(name,))
    with pytest.raises(ValueError, match=r'the network is on cpu, and mesh is of cuda: call net.to\("cuda"\) before'):
        LocalStep(network(), sgd, mesh=cuda)


def test_what_is_no_mesh_is_refused():
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, .*got int"):
        LocalStep(network(), sgd, mesh=2)


@pytest.mark.parametrize("lonely", [2], indirect=True)
def test_options_that_replicas_cannot_honour_are_refused(lonely):
    net = network()
    for option in ({"graph": True}, {"overlap": True}, {"plan": plan_memory(net, 4, sgd)}):
        with pytest.raises(ValueError, match="several processes|planned for one process"):
            LocalStep(net, sgd, mesh=mesh(2), **option)


@pytest.mark.parametrize("lonely", [1], indirect=True)
def test_a_mesh_of_one_process_changes_nothing(lonely):
    one, two = network(), network()
    steps = (
        LocalStep(one, sgd),
        LocalStep(two, sgd, mesh=init_device_mesh("cpu", (1, 1), mesh_dim_names=("stage", "replica"))),
    )
    for batch in parts(1, 2):
        outs = [step(*batch[0]) for step in steps]
        assert torch.equal(outs[0].module_losses, outs[1].module_losses)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


@pytest.mark.parametrize("lonely", [2], indirect=True)
def test_a_mesh_of_size_one_among_several_processes_trains_alone(lonely):
    alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("other", "replica"))["replica"]
    assert LocalStep(network(), sgd, mesh=alone)(*next(parts(1))[0]).loss.isfinite()

"""Several processes where something is unusual or goes wrong: what cannot be right is refused, in words."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import run
from replicated import everyone_agrees, network, parts, sgd
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from auglocal_ext import Greedy, LocalSequential, LocalStep
from auglocal_ext.distributed.link import Form
from auglocal_ext.distributed.stages import _digest
from auglocal_ext.nn.synced_norm import SyncedBatchNorm2d
from auglocal_ext.step.parameter_lists import held


def mesh(name):
    return init_device_mesh("cpu", (2,), mesh_dim_names=(name,))


def batch(size=8):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 10, (size,), generator=generator)


def assert_held_equal(net, expected):
    state = expected.state_dict()
    for name, value in net.state_dict().items():
        assert value.is_meta or torch.equal(value, state[name]), name


def test_parameters_are_left_out_only_where_another_process_holds_them():
    net, elsewhere, foreign = nn.Linear(2, 2), nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3))
    others = {id(p) for p in (*net.parameters(), elsewhere)}
    found = held([{"params": net.weight, "lr": 1.0}, ("bias", net.bias), elsewhere, foreign], net, others)
    assert found[0]["params"] == [net.weight] and found[0]["lr"] == 1.0
    assert found[1][1] is net.bias and found[2] is foreign and len(found) == 3
    assert held([elsewhere], net, others) == [{"params": []}]
    torch.optim.SGD(held([elsewhere], net, others), lr=0.1)


def test_digests_depend_on_bits_and_places_alone():
    x = torch.randn(4, 50)
    x[2, 3] = float("nan")
    assert torch.equal(_digest(x), _digest(x.clone()))
    moved, other = x[:, torch.randperm(50).sort(descending=True).values], x.clone()
    other[2, 4] += 1
    assert (_digest(moved) != _digest(x)).all()
    assert (_digest(other) != _digest(x)).tolist() == [False, False, True, False]
    bits = torch.tensor([[1, 0, 0, 1, 0, 1, 1, 0], [0, 1, 1, 0, 1, 0, 0, 1]])
    assert _digest(bits).unique().numel() == 2
    for dtype in (torch.float16, torch.bfloat16, torch.uint8, torch.bool, torch.int32):
        assert _digest(x.nan_to_num().to(dtype)).dtype == torch.int64
    assert _digest(torch.arange(3)).unique().numel() == 3


def test_maps_of_few_samples_travel_in_the_order_of_the_first_batch():
    whole = Form.of(torch.empty(8, 4, 2, 2).to(memory_format=torch.channels_last))
    single = torch.randn(1, 4, 2, 2)
    assert Form.of(single) != whole and Form.of(single).fits(whole)
    assert torch.equal(whole.as_features(whole.as_message(single)), single)
    assert not Form.of(single.double()).fits(whole) and not Form.of(single[:, 1:]).fits(whole)


def _stages(rank):
    _two_networks()
    _parameter_groups()
    _held_elsewhere()
    _other_batches(rank)


def _two_networks():
    """Features of one step are not taken for those of the other's, whose receiver has asked for a batch."""
    nets = network(), network("greedy")
    plain = [copy.deepcopy(net) for net in nets]
    steps = [LocalStep(net, sgd, mesh=mesh("stage")) for net in nets]
    plain_steps = [sgd(net.parameters()) for net in plain]
    for size in (8, 8, 5):
        for step, net, optimizer in zip(steps, plain, plain_steps, strict=True):
            step(*batch(size))
            optimizer.zero_grad()
            net(*batch(size)).loss.backward()
            optimizer.step()
    for step, net, expected in zip(steps, nets, plain, strict=True):
        step.close()
        assert_held_equal(net, expected)


def _parameter_groups():
    net = network()
    first, *others = net.parameters()
    groups = LocalStep(net, sgd, mesh=mesh("stage"), params=[{"params": first}, {"params": others}])
    count = torch.tensor(sum(len(group["params"]) for group in groups.optimizer.param_groups))
    torch.distributed.all_reduce(count)
    assert count == 1 + len(others)
    net = network()
    foreign = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match=r"holds a parameter of shape \(3,\) that no local module trains"):
        LocalStep(net, sgd, mesh=mesh("stage"), params=[*net.parameters(), foreign])
    net = network().requires_grad_(False)
    classifier = list(net.primary[-1].requires_grad_().parameters())
    step = LocalStep(net, sgd, mesh=mesh("stage"), params=classifier)
    before = [p.detach().clone() for p in classifier]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(step.optimizer, 5)
    step(*batch())
    scheduler.step()
    step.load_state_dict(step.state_dict())
    step.close()
    held_here = step._processes.stage.last == net.num_modules - 1
    assert all(torch.equal(p, old) != held_here for p, old in zip(classifier, before, strict=True))


def _held_elsewhere():
    net = network()
    step = LocalStep(net, sgd, mesh=mesh("stage"))
    with pytest.raises(RuntimeError, match=r"export\(\) copies all weights, and this process holds"):
        net.export()
    with pytest.raises(RuntimeError, match="which another LocalStep has spread over stages"):
        LocalStep(net, sgd, mesh=mesh("stage"))
    with pytest.raises(TypeError, match="x must be floating point"):
        step.predict(batch()[0].long())
    with pytest.raises(ValueError, match="x must have shape"):
        step.predict(batch()[0][:, :1])
    norm = nn.BatchNorm1d(6, affine=False)
    blocks = [nn.Sequential(nn.Linear(6, 6), norm, nn.ReLU()) for _ in range(2)]
    shared = LocalSequential(nn.Sequential(*blocks, nn.Linear(6, 4)), Greedy(), 4, (6,))
    with pytest.raises(ValueError, match=r"shares a buffer of shape \(6,\) with one of another stage"):
        LocalStep(shared, sgd, mesh=mesh("stage"))
    with pytest.raises(RuntimeError, match="stages 0 and 1 differ in"):
        LocalStep(network(), sgd, mesh=mesh("stage"), stage_cuts=(1 + torch.distributed.get_rank(),))


def _other_batches(rank):
    x, y = batch()
    step = LocalStep(network(), sgd, mesh=mesh("stage"))
    step(x, y)
    if rank == 0:
        step.close()
    else:
        with pytest.raises(RuntimeError, match=r"stage 0 has ended its run .* called with a further batch"):
            step(x, y)
        with pytest.raises(RuntimeError, match="a step of this process broke off with RuntimeError: stage 0 has ended"):
            step(x, y)
        step.close()
    step = LocalStep(network(), sgd, mesh=mesh("stage"))
    step(x, y)
    if rank == 0:
        step(x[:5], y[:5])
    else:
        with pytest.raises(ValueError, match="given 6 samples in batch 1 and the one before it 5"):
            step(x[:6], y[:6])
    step = LocalStep(network(), sgd, mesh=mesh("stage"))
    step(x, y)
    if rank == 0:
        step(x, y)
        with pytest.raises(RuntimeError, match="stage 1 did not take the features of batch 2"):
            step.close()
    else:
        with pytest.raises(RuntimeError, match="stage 0 has sent batch 1, which this stage was not called with"):
            step.close()


@pytest.mark.slow
def test_stages_refuse_what_would_go_wrong():
    run(2, _stages)


class Counting(nn.Module):
    """A layer with buffers of many dtypes, which differ between replicas."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        for dtype in (torch.float32, torch.int64, torch.int16, torch.bool, torch.complex64):
            self.register_buffer(str(dtype).removeprefix("torch."), torch.zeros(2, dtype=dtype))

    def forward(self, x):
        with torch.no_grad():
            for buffer in self.buffers():
                buffer[torch.distributed.get_rank()] = 1
        return self.layer(x)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(20, 6, sparse=True)

    def forward(self, x):
        return self.words(x).flatten(1)


def _replicas(rank):
    torch.manual_seed(0)
    net = LocalSequential(nn.Sequential(Counting(), nn.Linear(6, 3)), Greedy(), 3, (6,))
    LocalStep(net, sgd, mesh=mesh("replica"))(torch.randn(4, 6), torch.randint(0, 3, (4,)))
    for buffer in net.primary[0].buffers():
        assert buffer[0] == 1 and buffer[1] == 0, buffer
    everyone_agrees(network())

    tokens = torch.randint(0, 20, (4, 5))
    net = LocalSequential(nn.Sequential(Words(), nn.Linear(30, 3)), Greedy(), 3, example_input=tokens)
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.1), mesh=mesh("replica"))
    with pytest.raises(TypeError, match="primary.0.words.weight has a gradient of layout .*make the layer with sparse"):
        step(tokens, torch.randint(0, 3, (4,)))

    net = network()
    step = LocalStep(net, sgd, mesh=mesh("replica"), params=net.primary.parameters())
    step(*next(parts(2))[rank])
    assert all(p.grad is None for p in net.parameters())

    net = network()
    step = LocalStep(net, sgd, mesh=mesh("replica"), sync_batch_norm=True)
    step(*batch(1))  # BatchNorm of features sees two samples
    everyone_agrees(net)
    with pytest.raises(ValueError, match="a batch of one image"):
        net(*batch(1))
    exported = net.export()
    assert any(isinstance(layer, SyncedBatchNorm2d) for layer in net.primary.modules())
    assert not any(isinstance(layer, SyncedBatchNorm2d) for layer in exported.modules())

    def fail(*_):
        raise OSError("no more data")

    handle = net.primary[-1].register_forward_pre_hook(fail)
    with pytest.raises(OSError, match="no more data"):
        step(*batch())
    handle.remove()
    with pytest.raises(RuntimeError, match="broke off with OSError: no more data, .* resume from a checkpoint"):
        step(*batch())

    if rank == 0:
        step = LocalStep(network(), sgd, mesh=mesh("replica"))
        with pytest.raises(RuntimeError, match=r"local module 0 were not averaged .this is rank 0, batch 1\)"):
            for _ in range(2):
                step(*batch())
    else:
        LocalStep(network(), sgd, mesh=mesh("replica"))(*batch())


@pytest.mark.slow
def test_replicas_refuse_what_would_go_wrong():
    run(2, _replicas)


def _absent(rank):
    """One process leaves before the first batch; the errors of the others name rank, stage and batch."""
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "replica"))
    step = LocalStep(network(), sgd, mesh=grid)
    averaged = r"local module \d were not averaged \(this is rank {}, stage {}, batch [012]\)"
    messages = {
        0: averaged.format(0, 0),
        1: r"stage 1 did not take the features of batch [012] \(stage 0 is rank 1\)|" + averaged.format(1, 0),
        2: averaged.format(2, 1),
    }
    if rank < 3:
        with pytest.raises(RuntimeError, match=messages[rank]):
            for _ in range(3):
                step(*batch())


@pytest.mark.slow
def test_errors_name_rank_stage_and_batch():
    run(4, _absent)
    run(2, _late)


def _late(rank):
    """The first batch of a stage that waits in vain, and of replicas that merge statistics."""
    if rank == 0:
        step = LocalStep(network(), sgd, mesh=mesh("stage"))
        step = LocalStep(network(), sgd, mesh=mesh("replica"), sync_batch_norm=True)
        step(*batch())
    else:
        stage = LocalStep(network(), sgd, mesh=mesh("stage"))
        step = LocalStep(network(), sgd, mesh=mesh("replica"), sync_batch_norm=True)
        step(*batch())
        with pytest.raises(RuntimeError, match=r"BatchNorm layer were not merged \(this is rank 1, batch 1\)"):
            step(*batch())
        with pytest.raises(RuntimeError, match=r"stage 0 did not send the features of batch 0 \(stage 1 is rank 1\)"):
            stage(*batch())


def test_gradients_that_no_optimizer_uses_are_dropped():
    net = network("greedy")
    step = LocalStep(net, sgd, params=net.primary.parameters())
    step(*batch())
    assert all(p.grad is None for p in net.parameters())


def test_the_export_has_the_layers_that_were_wrapped():
    from auglocal_ext.nn import sync_batch_norm

    net = network("greedy")
    expected = [type(layer) for layer in net.export().modules()]
    assert sync_batch_norm(net) > 0
    assert [type(layer) for layer in net.export().modules()] == expected

"""``LocalStep`` over stages: several processes that hold a part of the network each come to what one process does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from ranks import run
from replicated import network, parts, sgd
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from auglocal_ext import AugLocal, Greedy, LocalSequential, LocalStep
from auglocal_ext.distributed import DisagreementError, balanced_cuts
from auglocal_ext.planning import plan_memory

SIZES = (8, 8, 5, 8, 3, 8)


def mesh(stages, replicas=1):
    return init_device_mesh("cpu", (stages, replicas), mesh_dim_names=("stage", "replica"))


def batches():
    generator = torch.Generator().manual_seed(5)
    for size in SIZES:
        x = torch.randn(size, 3, 16, 16, generator=generator, dtype=torch.float64)
        yield x, torch.randint(0, 10, (size,), generator=generator)


def alone(net, **options):
    """State, losses per step and test output of one process."""
    step = LocalStep(net, sgd, **options)
    losses = [step(*batch).module_losses for batch in batches()]
    net.eval()
    with torch.no_grad():
        output = net(next(batches())[0])
    return net.state_dict(), torch.stack(losses), output


def assert_stage_equals(what, net, wanted, mesh, **options):
    """This process's stage of ``net`` comes to what one process does alone, to the bit."""
    state, losses, output = wanted
    step = LocalStep(net, sgd, mesh=mesh, **options)
    stage = step._processes.stage
    ours = [out.module_losses for out in (step(*batch) for batch in batches())]
    assert torch.equal(torch.stack(ours), losses[:, stage.first : stage.last + 1]), what
    held = {key: value for key, value in net.state_dict().items() if not value.is_meta}
    assert 0 < len(held) < len(state)
    for key, value in held.items():
        assert torch.equal(value, state[key]), f"{what}: {key}"
    counted = torch.tensor(len(held))
    torch.distributed.all_reduce(counted, group=mesh.get_group("stage"))
    assert counted == len(state)  # every tensor is held by one process
    net.eval()
    found = step.predict(next(batches())[0])
    assert (found is None) == (stage.last < net.num_modules - 1)
    assert found is None or torch.equal(found, output)
    with pytest.raises(RuntimeError, match="this process holds local modules .* train by step.x, y."):
        net(next(batches())[0])
    step.close()


def channels_last(net):
    return net.to(memory_format=torch.channels_last)


def _two_stages(rank, wanted):
    for name in ("auglocal", "contsup"):
        assert_stage_equals(name, network(name), wanted[name], mesh(2))
    assert_stage_equals("channels last", channels_last(network("auglocal")), wanted["channels last"], mesh(2))


def test_two_stages_equal_one_process_to_the_bit():
    wanted = {name: alone(network(name)) for name in ("auglocal", "contsup")}
    run(2, _two_stages, wanted | {"channels last": alone(channels_last(network("auglocal")))})


OPTIONS = ({"accumulate": 2, "clip_norm": 0.1}, {"recompute": "all"})


def _options(rank, wanted):
    for options, expected in zip(OPTIONS, wanted, strict=True):
        assert_stage_equals(options, network("contsup"), expected, mesh(3), stage_cuts=(1, 3), **options)


@pytest.mark.slow
def test_options_over_stages():
    run(3, _options, [alone(network("contsup"), **options) for options in OPTIONS])


def test_cuts_are_balanced():
    assert balanced_cuts([1, 1, 1, 1], 2) == (2,)
    assert balanced_cuts([5, 1, 1, 1, 1, 1], 2) == (1,)
    assert balanced_cuts([1, 2, 3, 4, 5], 3) == (3, 4)
    assert balanced_cuts([3, 1], 2) == (1,) and balanced_cuts([7], 1) == ()


def _refusals(rank):
    for net, options, message in (
        (network("auglocal"), {"stage_cuts": (0,)}, r"1 increasing numbers within 1 .. 2; got \(0,\)"),
        (network("auglocal"), {"stage_cuts": (1, 2)}, r"1 increasing numbers .* got \(1, 2\)"),
        (network(AugLocal(2), modules=1), {}, "2 stages need as many local modules, and the network has 1"),
        (network("auglocal"), {"clip_norm": 1.0, "clip": "global"}, 'clip="global" needs the gradients of all stages'),
        (network("auglocal"), {"autocast": torch.float16}, "grad_scaler=.* cannot be honoured among several stages"),
        (network("auglocal"), {"graph": True}, "graph=True cannot be honoured among several processes"),
        (network("auglocal"), {"plan": plan_memory(network("auglocal"), 4, sgd)}, "planned for one process"),
        (network("auglocal"), {"sync_batch_norm": True}, "sync_batch_norm=True is for several replicas"),
        (_tied(), {"stage_cuts": (2,)}, "local module 2 shares a parameter .* keep them together"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalStep(net, sgd, mesh=mesh(2), **options)
    with pytest.raises(DisagreementError, match="stages 0 and 1 differ in the initial weights .another seed"):
        LocalStep(network("auglocal", seed=rank), sgd, mesh=mesh(2))
    with pytest.raises(DisagreementError, match="differ in stage_cuts"):
        LocalStep(network("auglocal"), sgd, mesh=mesh(2), stage_cuts=(1 + rank,))
    LocalStep(_tied(), sgd, mesh=mesh(2), stage_cuts=(1,))

    step = LocalStep(network("auglocal"), sgd, mesh=mesh(2), check_batches=True)
    x, y = next(batches())
    step(x, y)
    with pytest.raises(ValueError, match="a batch of 16 samples after a first one of 8: .*begin with the largest"):
        step(torch.cat([x, x]), torch.cat([y, y]))
    if rank == 0:
        step(x, y)
    else:
        with pytest.raises(ValueError, match="stages 0 and 1 were given other samples at 2 of 8 places .*first at 3"):
            step(torch.cat([x[:3], x[[4, 3]], x[5:]]), y)
    step.close()


def _tied():
    torch.manual_seed(3)
    tied = nn.Linear(6, 6)
    return LocalSequential(
        nn.Sequential(nn.Linear(6, 6), nn.Sequential(tied), nn.Sequential(tied), nn.Linear(6, 10)), Greedy(), 10, (6,)
    )


@pytest.mark.slow
def test_what_stages_cannot_honour_is_refused():
    run(2, _refusals)


def _grid(rank, state):
    """Two stages of two replicas each: the state of two replicas in one stage."""
    net = network("contsup", seed=7)
    grid = mesh(2, 2)
    step = LocalStep(net, sgd, mesh=grid)
    replica = grid.get_local_rank("replica")
    for batch in parts(2):
        step(*batch[replica])
    for key, value in net.state_dict().items():
        if not value.is_meta:
            assert torch.equal(value, state[key]), key
    step.close()


def _replicas_alone(rank, path):
    net = network("contsup", seed=7)
    step = LocalStep(net, sgd, mesh=mesh(1, 2))
    for batch in parts(2):
        step(*batch[rank])
    if rank == 0:
        torch.save(net.state_dict(), path)


@pytest.mark.slow
def test_stages_of_replicas(tmp_path):
    run(2, _replicas_alone, str(tmp_path / "state.pt"))
    run(4, _grid, torch.load(tmp_path / "state.pt"))


def _bounded(rank):
    """A slow last stage holds the first one back: it is at most two batches ahead."""
    import time

    step = LocalStep(network("auglocal"), sgd, mesh=mesh(2))
    stage = step._processes.stage
    x, y = next(batches())
    begun = torch.zeros(1, dtype=torch.int64)
    store = torch.distributed.distributed_c10d._get_default_store()
    for batch in range(8):
        if rank == 1:
            time.sleep(0.3)
            store.set("slow", str(batch))
        step(x, y)
        if rank == 0 and batch >= 3:
            assert int(store.get("slow")) >= batch - 3, batch
        begun += 1
    assert stage.index == rank
    step.close()


@pytest.mark.slow
def test_a_slow_stage_holds_the_others_back():
    run(2, _bounded)


def _page(rank, code):
    x, y = torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))
    exec(code, {"loader": [(x, y)] * 2})


@pytest.mark.slow
def test_the_page_runs():
    page = (Path(__file__).resolve().parents[2] / "docs" / "many-devices.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, flags=re.S)[1]
    begin = 'torch.distributed.init_process_group("nccl")'
    assert begin in code
    run(4, _page, code.replace(begin, "").replace('"cuda"', '"cpu"').replace("resnet110", "resnet20"))

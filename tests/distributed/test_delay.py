"""``LocalStep(delay=)``: stages train on older features, and one process replays such a run to the bit."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from ranks import run
from replicated import network, parts, sgd
from test_edges import ReadoutRule
from test_stages import mesh
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException

from auglocal_ext import MAN, LocalStep
from auglocal_ext.distributed import CheckpointError
from auglocal_ext.planning import plan_memory

BATCHES = [batch for (batch,) in parts(1, 10)]
CUTS = {2: (1,), 3: (1, 2)}


def schedule(step):
    """The learning rate of each update is its own."""
    return torch.optim.lr_scheduler.ExponentialLR(step.optimizer, 0.8)


def trained(step, batches):
    """What a run returns, with a learning rate that falls with every update."""
    rates, outs = schedule(step), []
    for x, y in batches:
        outs.append(step(x, y))
        if step.updated:
            rates.step()
    return outs + step.drain()


def replayed(name, stages, delay, batches=BATCHES, **options):
    """State, losses and targets of one process that takes all stages."""
    net = network(name)
    step = LocalStep(net, sgd, stage_cuts=CUTS[stages], delay=delay, **options)
    outs = trained(step, batches)
    return net.state_dict(), torch.stack([out.module_losses for out in outs]), [out.target for out in outs]


def _train(rank, wanted, stages, delay, options):
    for name, (state, losses, targets) in wanted.items():
        net = network(name)
        step = LocalStep(net, sgd, mesh=mesh(stages), stage_cuts=CUTS[stages], delay=delay, **options)
        stage = step._processes.stage
        outs = trained(step, BATCHES)
        ours = torch.stack([out.module_losses for out in outs])
        expected = losses[:, stage.first : stage.last + 1]
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)
        if rank == stages - 1:
            assert all(torch.equal(out.target, target) for out, target in zip(outs, targets, strict=True))
        for key, value in net.state_dict().items():
            if not value.is_meta:
                assert torch.equal(value, state[key]), f"{name}: {key}"
        step.close()


def literal(delay, cut, batches, drained=True, rate=0.8):
    """Two stages by plain PyTorch: the second one takes what the first made ``delay`` batches ago."""
    net = network("auglocal")
    optimizer = sgd(net.parameters())
    made, count = [], len(batches)
    for call in range(count + delay * drained):
        if call < count:
            h = batches[call][0]
            for module in net.local_modules[:cut]:
                h = train_module(module, h, batches[call][1], optimizer)
            made.append((h, batches[call][1]))
        if call >= delay:
            h, y = made[call - delay]
            for module in net.local_modules[cut:]:
                h = train_module(module, h, y, optimizer)
        if call < count:
            optimizer.param_groups[0]["lr"] *= rate
    return net.state_dict()


def train_module(module, h, y, optimizer):
    """A local update of one module: the gradients of others are None, so the optimizer leaves them."""
    optimizer.zero_grad()
    out = module(h)
    module.local_loss(out, y).backward()
    optimizer.step()
    return out.detach()


def differ(state, other):
    return {key for key, value in state.items() if not torch.equal(value, other[key])}


def test_one_process_equals_a_plain_loop():
    batches = BATCHES[:4]
    undelayed = literal(0, 1, batches)
    for delay in (1, 2):
        state, losses, targets = replayed("auglocal", 2, delay, batches)
        assert not differ(state, literal(delay, 1, batches))
        changed = differ(state, undelayed)
        assert {key.split(".")[0] for key in changed} == {"primary", "auxiliary"}
        assert not any(key.startswith("auxiliary.0") for key in changed)  # of the first stage

        trains = [[call < 4] + [call >= delay] * 2 for call in range(4 + delay)]
        assert losses.isnan().logical_not().tolist() == trains
        assert [len(target) for target in targets] == [0] * delay + [4] * 4
        assert torch.equal(targets[delay], batches[0][1])

        step = LocalStep(network("auglocal"), sgd, stage_cuts=(1,), delay=delay)
        outs = [step(*batch) for batch in batches]
        assert outs[0].module_counts.tolist()[1:] == [-1, -1] and outs[0].loss.isnan() and outs[0].output.numel() == 0
        assert outs[-1].loss == outs[-1].module_losses.sum() and outs[-1].output.shape == (4, 10)
        assert not differ(step.net.state_dict(), literal(delay, 1, batches, drained=False, rate=1))
        # With one learning rate all that a delay changes is when a stage trains on a batch.
        step.drain()
        assert not differ(step.net.state_dict(), literal(0, 1, batches, rate=1))
    man = [replayed("man", 2, delay, batches)[0] for delay in (1, 2)]
    assert differ(*man)


@pytest.mark.slow
def test_two_stages_equal_the_replay():
    names = ("auglocal", "man")
    run(2, _train, {name: replayed(name, 2, 1) for name in names}, 2, 1, {"check_batches": True})


EVERY = ("auglocal", "contsup", "infopro", "man")


@pytest.mark.slow
@pytest.mark.parametrize("delay", [1, 2])
@pytest.mark.parametrize("stages", [2, 3])
def test_stages_equal_the_replay(stages, delay):
    run(stages, _train, {name: replayed(name, stages, delay) for name in EVERY}, stages, delay, {})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("delay", "options"),
    [
        (2, {"accumulate": 2, "clip_norm": 0.1}),
        (1, {"recompute": "all", "check_batches": True}),
        (12, {}),  # more than there are batches
    ],
    ids=str,
)
def test_options(delay, options):
    alone = {key: value for key, value in options.items() if key != "check_batches"}
    wanted = {name: replayed(name, 3, delay, **alone) for name in ("contsup", "man")}
    run(3, _train, wanted, 3, delay, options)


def _late(rank, slow, wanted):
    step = LocalStep(network("man"), sgd, mesh=mesh(3), stage_cuts=CUTS[3], delay=1)
    rates = schedule(step)
    for number, batch in enumerate(BATCHES):
        if rank == slow and number % 3 == 0:
            time.sleep(0.3)
        step(*batch)
        rates.step()
    step.close()  # drains
    for key, value in step.net.state_dict().items():
        assert value.is_meta or torch.equal(value, wanted[key]), key


@pytest.mark.slow
@pytest.mark.parametrize("slow", [0, 1, 2])
def test_a_slow_stage_changes_nothing(slow):
    run(3, _late, slow, replayed("man", 3, 1)[0])


def _ahead(rank):
    """The later stage goes on for two batches without the earlier one, which is never far ahead of it."""
    step = LocalStep(network("auglocal"), sgd, mesh=mesh(2), stage_cuts=(1,), delay=2)
    stage = step._processes.stage
    store = torch.distributed.distributed_c10d._get_default_store()
    for number, batch in enumerate(BATCHES):
        if rank == 0 and number == 6:
            store.wait(["call 7 of stage 1"])
        step(*batch)
        store.set(f"call {number} of stage {rank}", "")
        if rank == 1 and number >= 2:
            assert len(stage._from._asked) == 3 and stage._from._arrived <= 3
    for number in range(5):
        if rank == 1:
            time.sleep(0.3)
            store.set("slow", str(number))
        step(*BATCHES[number])
        if rank == 0 and number >= 3:
            assert int(store.get("slow")) >= number - 3, number
    step.close()


@pytest.mark.slow
def test_stages_are_a_bounded_number_of_batches_apart():
    run(2, _ahead)


def _grid(rank, stages, folder):
    """Two replicas that replay two stages, or of two stages."""
    grid = mesh(stages, 2)
    net = network("man")
    step = LocalStep(net, sgd, mesh=grid, stage_cuts=(2,), delay=1)
    for batch in parts(2, 6):
        step(*batch[grid.get_local_rank("replica")])
    step.drain()
    if stages == 1 and rank == 0:
        torch.save(net.state_dict(), folder / "state.pt")
    gathers = LocalStep(network("predsim"), sgd, mesh=grid, stage_cuts=(2,), delay=1, gather_features=True)
    for batch in parts(2, 3):
        gathers(*batch[grid.get_local_rank("replica")])
    gathers.close()
    if stages == 1 and rank == 0:
        torch.save(gathers.net.state_dict(), folder / "gathered.pt")
    if stages == 2:
        for trained, name in ((net, "state.pt"), (gathers.net, "gathered.pt")):
            state = torch.load(folder / name)
            for key, value in trained.state_dict().items():
                assert value.is_meta or torch.equal(value, state[key]), key
        step.save(folder / "drained")
        step(*next(parts(1))[0])
        step.save(folder / "in flight")
        step.close()


@pytest.mark.slow
def test_stages_of_replicas(tmp_path):
    run(2, _grid, 1, tmp_path)
    run(4, _grid, 2, tmp_path)
    step = LocalStep(network("man", seed=3), sgd, stage_cuts=(2,), delay=1)
    with pytest.raises(CheckpointError, match="and 2 replicas, and here it is delay=1, .* and 1 replica"):
        step.load(tmp_path / "in flight")
    step.load(tmp_path / "drained")


def _until_killed(rank, folder, name, dies):
    """Train on from the last checkpoint, and save after every third batch."""
    step = LocalStep(network(name, seed=95 if folder.exists() else 7), sgd, mesh=mesh(3), stage_cuts=(1, 2), delay=2)
    rates = schedule(step)
    begun = 0
    if folder.exists():
        if dies is None:
            for batch in BATCHES[:3]:
                step(*batch)  # of another run, which load() ends
        extra = step.load(folder)
        begun = extra["batches"]
        rates.load_state_dict(extra["scheduler"])
    for number in range(begun, len(BATCHES)):
        if dies == (rank, number):
            os.kill(os.getpid(), signal.SIGKILL)
        step(*BATCHES[number])
        rates.step()
        if number % 3 == 2:
            step.save(folder, {"batches": number + 1, "scheduler": rates.state_dict()})
    step.drain()
    torch.save(step.net.state_dict(), folder.with_name(f"{name} {rank}.pt"))
    step.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["contsup", "man"])
def test_killed_processes_go_on_to_the_bit(tmp_path, name):
    """Once while later stages still wait for their first batch, once later."""
    expected = replayed(name, 3, 2)[0]
    for dies in ((1, 4), (2, 8)):
        with pytest.raises((ProcessExitedException, ProcessRaisedException)):
            run(3, _until_killed, tmp_path / "last", name, dies)
    for delay, cuts in ((1, (1, 2)), (2, (1,)), (0, None)):
        other = LocalStep(network(name), sgd, stage_cuts=cuts, delay=delay)
        with pytest.raises(CheckpointError, match=r"in flight with delay=2, stage_cuts=\(1, 2\) and 1 replica, and "):
            other.load(tmp_path / "last")

    # One process goes on from what three have saved.
    step = LocalStep(network(name, seed=94), sgd, stage_cuts=(1, 2), delay=2)
    rates = schedule(step)
    trained(step, BATCHES[:3])
    extra = step.load(tmp_path / "last")
    rates.load_state_dict(extra["scheduler"])
    for batch in BATCHES[extra["batches"] :]:
        step(*batch)
        rates.step()
    step.close()
    assert not differ(step.net.state_dict(), expected)

    run(3, _until_killed, tmp_path / "last", name, None)
    found = [torch.load(tmp_path / f"{name} {rank}.pt") for rank in range(3)]
    for key, value in expected.items():
        held = [state[key] for state in found if not state[key].is_meta]
        assert len(held) == 1 and torch.equal(held[0], value), key


def twice(step, folder=None):
    """Losses of two runs, the second of which is saved before its last two batches."""
    outs, rates = trained(step, BATCHES[:5]), schedule(step)
    for number, batch in enumerate(BATCHES[5:], 5):
        if number == 8 and folder is not None:
            step.save(folder)
        outs.append(step(*batch))
        rates.step()
    return torch.stack([out.module_losses for out in outs + step.drain()])


def _twice(rank, wanted, folder):
    for at, (rule, delay, state, losses) in enumerate(wanted):
        net, options = network(rule), {"mesh": mesh(3), "stage_cuts": (1, 2), "delay": delay}
        step = LocalStep(net, sgd, **options)
        stage = step._processes.stage
        expected = losses[:, stage.first : stage.last + 1]
        torch.testing.assert_close(twice(step, folder / str(at)), expected, rtol=0, atol=0, equal_nan=True)
        step.close()

        resumed = LocalStep(network(rule, seed=4), sgd, **options)
        for batch in BATCHES[:3]:
            resumed(*batch)  # of another run, which load() ends
        resumed.load(folder / str(at))
        rates = schedule(resumed)
        for batch in BATCHES[8:]:
            resumed(*batch)
            rates.step()
        resumed.close()
        for found in (net.state_dict(), resumed.net.state_dict()):
            for key, value in found.items():
                assert value.is_meta or torch.equal(value, state[key]), f"{rule}, {delay}: {key}"


@pytest.mark.slow
def test_rules_that_follow_older_parameters(tmp_path):
    """The versions they read are those of the replay: over two runs, and after a checkpoint."""
    wanted = []
    for rule, delay in ((ReadoutRule(3, 2), 1), (ReadoutRule(1, 0), 2), (ReadoutRule(2, 5), 2), (MAN(0.9), 2)):
        net = network(rule)
        losses = twice(LocalStep(net, sgd, stage_cuts=(1, 2), delay=delay))
        wanted.append((rule, delay, net.state_dict(), losses))
    run(3, _twice, wanted, tmp_path)


def test_a_replay_is_resumed_to_the_bit(tmp_path):
    expected = replayed("contsup", 3, 2, BATCHES[:6])[0]
    step = LocalStep(network("contsup"), sgd, stage_cuts=(1, 2), delay=2)
    rates = schedule(step)
    for batch in BATCHES[:3]:
        step(*batch)
        rates.step()
    step.save(tmp_path / "flying", {"rates": rates.state_dict()})
    with pytest.raises(RuntimeError, match=r"batches are in flight.*call step.drain\(\) first, or step.save"):
        step.state_dict()
    with pytest.raises(RuntimeError, match=r"batches are in flight.*call step.drain\(\) first"):
        step.load_state_dict({})
    again = LocalStep(network("contsup", seed=8).to(memory_format=torch.channels_last), sgd, stage_cuts=(1, 2), delay=2)
    again.net.to(memory_format=torch.contiguous_format)
    rates = schedule(again)
    rates.load_state_dict(again.load(tmp_path / "flying")["rates"])
    for batch in BATCHES[3:6]:
        again(*batch)
        rates.step()
    again.drain()
    assert not differ(again.net.state_dict(), expected)
    assert again.drain() == [] and again.state_dict()["optimizer"]["state"]
    again.save(tmp_path / "drained")
    LocalStep(network("contsup"), sgd).load(tmp_path / "drained")


def test_what_a_delay_cannot_honour_is_refused():
    net = network("auglocal")
    for options, message in (
        ({"delay": 1}, 'delay=1 is between stages: pass a mesh with a dimension "stage", or, to replay'),
        ({"delay": -1, "stage_cuts": (1,)}, "delay is a number of batches, at least 0; got -1"),
        ({"delay": True, "stage_cuts": (1,)}, "delay is a number of batches, at least 0; got True"),
        ({"stage_cuts": (1,)}, "stage_cuts is for several stages: .* or delay= to replay a run"),
        ({"delay": 1, "stage_cuts": (2, 1)}, r"increasing numbers within 1 .. 2; got \(2, 1\)"),
        ({"delay": 1, "stage_cuts": ()}, r"increasing numbers within 1 .. 2; got \(\)"),
        ({"delay": 1, "stage_cuts": (3,)}, r"increasing numbers within 1 .. 2; got \(3,\)"),
        ({"delay": 1, "stage_cuts": (1,), "graph": True}, "graph=True cannot be honoured among stages with a delay"),
        ({"delay": 1, "stage_cuts": (1,), "overlap": True}, "overlap=True cannot be honoured"),
        ({"delay": 1, "stage_cuts": (1,), "autocast": torch.float16}, "each of which would find a scale of its own"),
        ({"delay": 1, "stage_cuts": (1,), "plan": plan_memory(net, 4, sgd)}, "do not count the batches that delay="),
        ({"delay": 1, "stage_cuts": (1,), "clip_norm": 1.0, "clip": "global"}, "clips gradients of one batch"),
        ({"delay": 3, "stage_cuts": (1,), "accumulate": 2}, "Take a delay that is a multiple of accumulate"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalStep(net, sgd, **options)
    for cuts in (1, "1", (1.0,), [None]):
        with pytest.raises(TypeError, match="stage_cuts are the numbers of local modules, .* got"):
            LocalStep(net, sgd, stage_cuts=cuts, delay=1)
    step = LocalStep(net, sgd, stage_cuts=(1,), delay=1)
    assert step.eager_reason == "steps with a delay run eagerly" and step.stage_cuts == (1,)

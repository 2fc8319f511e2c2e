"""Rules that follow parameters of later layers, over stages: the parameters are sent back, and nothing changes."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

import pytest
import torch
from language import LENGTH, VOCABULARY, decoder, tokens
from ranks import run
from replicated import network, parts, sgd
from test_stages import mesh
from torch import nn

from auglocal_ext import DGL, MAN, SOLO, InfoPro, LanguageModelling, LocalSequential, LocalStep
from auglocal_ext.auxiliary import Auxiliary, Followed
from auglocal_ext.rules.base import Rule

BATCHES = [batch for (batch,) in parts(1, 10)]
RULES = {
    "man": MAN(0.9),
    "man and dgl": MAN(0.9, head=DGL()),
    "man and infopro": MAN(0.9, head=InfoPro((0.5, 1.0), (1.0, 0.5))),
}


class Readout(Auxiliary):
    """A loss through a read-only linear layer: that of the network's end, as it was some steps ago."""

    follows_layers = True

    def __init__(self, settings, features, followed):
        super().__init__(settings)
        self.own = nn.Linear(features.channels, followed.parameters[0].shape[1])
        self._features, self._followed = features, followed
        self.read = []

    def forward(self, h):
        return nn.functional.linear(self.own(self._features.pooled(h)), *self._followed.values()[:2])

    def loss(self, h, context):
        self.read.append(self._followed.values()[1].sum())
        return self.settings.task.score(self(h), context.target)

    def follows(self):
        return (self._followed,)


@dataclass(frozen=True)
class ReadoutRule(Rule):
    every: int = 3
    lag: int = 2

    follows_layers = True

    def build_auxiliary(self, network, module):
        followed = Followed([network.primary[-1]], every=self.every, lag=self.lag)
        return Readout(network.settings(module), network.features(module), followed)


def test_one_process_reads_the_parameters_of_earlier_steps():
    """Against a plain list of what the readout was when each step began."""
    for every, lag in ((3, 2), (1, 0), (1, 2), (2, 0), (2, 5)):
        net = network(ReadoutRule(every, lag))
        step = LocalStep(net, sgd)
        began = []
        for x, y in BATCHES:
            began.append(net.primary[-1].fc.bias.detach().sum())
            step(x, y)
        expected = [began[max(0, (u - lag) // every * every)] for u in range(len(BATCHES))]
        assert net.auxiliary[0].read == net.auxiliary[-1].read == expected
        assert len(set(expected)) > 1
        assert len(net.auxiliary[0]._followed._copies) <= lag // every + 2
        assert not any("followed" in name for name in net.state_dict())
    for options in ({"every": 0}, {"lag": -1}, {"every": True}):
        with pytest.raises(ValueError, match="is a number of steps, at least"):
            Followed([], **options)


def one_process(rule, **options):
    net = network(rule)
    step = LocalStep(net, sgd, **options)
    losses = [step(*batch).module_losses for batch in BATCHES]
    return net.state_dict(), torch.stack(losses)


def assert_held(net, state, what=""):
    """What this process holds of the network is as one process has it, and it holds nothing else."""
    held = {key: value for key, value in net.state_dict().items() if not value.is_meta}
    assert 0 < len(held) < len(state)
    for key, value in held.items():
        assert torch.equal(value, state[key]), f"{what}: {key}"


def _train(rank, wanted, stages, options):
    for rule, (state, losses) in wanted:
        net = network(rule)
        step = LocalStep(net, sgd, mesh=mesh(stages), **options)
        stage = step._processes.stage
        ours = [step(*batch).module_losses for batch in BATCHES]
        assert torch.equal(torch.stack(ours), losses[:, stage.first : stage.last + 1]), rule
        assert_held(net, state, rule)
        held = {id(p) for p in net.parameters() if not p.is_meta}
        assert {id(p) for group in step.optimizer.param_groups for p in group["params"]} == held
        if stage.last < net.num_modules - 1:
            followed = net.auxiliary[stage.last].follows()[0]
            assert all(p.is_meta for p in followed.parameters) and not any(v.is_meta for v in followed.values())
            copy.deepcopy(net)  # without what belongs to these processes
        step.close()


READOUTS = [ReadoutRule(*numbers) for numbers in ((3, 2), (1, 0), (1, 5), (2, 7))]


@pytest.mark.slow
def test_every_number_of_stages():
    """Four stages of one local module each, too."""
    wanted = [(rule, one_process(rule)) for rule in (RULES["man"], *READOUTS)]
    for stages in (2, 3, 4):
        run(stages, _train, wanted, stages, {})


@pytest.mark.slow
def test_options_over_stages():
    options = {"accumulate": 2, "clip_norm": 0.1}
    wanted = [(rule, one_process(rule, **options)) for rule in (*RULES.values(), *READOUTS)]
    run(3, _train, wanted, 3, options)


def _replicas(rank, folder, stages):
    """Two replicas of all modules, or of two stages."""
    grid = mesh(stages, 2)
    for at, rule in enumerate((RULES["man"], ReadoutRule())):
        net = network(rule)
        step = LocalStep(net, sgd, mesh=grid)
        for batch in parts(2, 6):
            step(*batch[grid.get_local_rank("replica")])
        if stages == 1 and rank == 0:
            torch.save(net.state_dict(), folder / f"{at}.pt")
        if stages > 1:
            assert_held(net, torch.load(folder / f"{at}.pt"), rule)
        step.close()


@pytest.mark.slow
def test_stages_of_replicas(tmp_path):
    run(2, _replicas, tmp_path, 1)
    run(4, _replicas, tmp_path, 2)


def _resumed(rank, folder, wanted, stages, name, begun, saved):
    for at, (rule, (state, _)) in enumerate(wanted):
        step = LocalStep(network(rule, seed=50), sgd, mesh=mesh(stages))
        for batch in BATCHES[:2]:
            step(*batch)  # of another run, which load() ends
        step.load(folder / f"{name} {at}")
        for number, batch in enumerate(BATCHES[begun:], begun):
            if number == saved:
                step.save(folder / f"{stages} {at}")
                if stages == 3:
                    step.close()
            step(*batch)
        assert_held(step.net, state, rule)
        step.close()


@pytest.mark.slow
def test_checkpoints_on_other_numbers_of_stages(tmp_path):
    """From one process to two stages, to three, and back."""
    rules = [RULES["man"], ReadoutRule(), ReadoutRule(2, 5)]
    wanted = [(rule, one_process(rule)) for rule in rules]
    for at, rule in enumerate(rules):
        step = LocalStep(network(rule), sgd)
        for batch in BATCHES[:4]:
            step(*batch)
        step.save(tmp_path / f"1 {at}")
    run(2, _resumed, tmp_path, wanted, 2, "1", 4, 7)
    run(3, _resumed, tmp_path, wanted, 3, "2", 7, 8)
    for at, (rule, (state, _)) in enumerate(wanted):
        step = LocalStep(network(rule, seed=51), sgd)
        step.load(tmp_path / f"3 {at}")
        for batch in BATCHES[8:]:
            step(*batch)
        assert all(torch.equal(value, state[key]) for key, value in step.net.state_dict().items()), rule


def test_a_plain_checkpoint_holds_earlier_parameters(tmp_path):
    rule = ReadoutRule(3, 2)
    step, again = (LocalStep(network(rule, seed=seed), sgd) for seed in (7, 8))
    for batch in BATCHES[:4]:
        step(*batch)
    torch.save({"network": step.net.state_dict(), "step": step.state_dict()}, tmp_path / "plain.pt")
    saved = torch.load(tmp_path / "plain.pt")
    again.net.load_state_dict(saved["network"])
    again.load_state_dict(saved["step"])
    for batch in BATCHES[4:8]:
        step(*batch)
        again(*batch)
    assert all(map(torch.equal, step.net.state_dict().values(), again.net.state_dict().values()))


def _slow(rank, slow, wanted):
    """A stage that is late at random changes nothing, and nobody is far ahead of it."""
    for rule, (state, _) in wanted:
        step = LocalStep(network(rule), sgd, mesh=mesh(3))
        for number, batch in enumerate(BATCHES):
            if rank == slow and number % 3 == 0:
                time.sleep(0.3)
            step(*batch)
        assert_held(step.net, state, rule)
        step.close()


@pytest.mark.slow
@pytest.mark.parametrize("slow", [0, 1, 2])
def test_a_slow_stage_changes_nothing(slow):
    rules = [RULES["man"], ReadoutRule(1, 6)]
    run(3, _slow, slow, [(rule, one_process(rule)) for rule in rules])


class Silent(Readout):
    def follows(self):
        return ()


@dataclass(frozen=True)
class Backward(ReadoutRule):
    """Follows the first layer, which is in an earlier stage; or layers of two stages; or does not say what."""

    layers: tuple[int, ...] = (0,)

    def build_auxiliary(self, network, module):
        followed = Followed([network.primary[-1], *(network.primary[i] for i in self.layers)])
        kind = Readout if self.layers else Silent
        return kind(network.settings(module), network.features(module), followed)


def _refusals(rank):
    for rule, message in (
        (Backward(layers=(0,)), "Readout of local module 0 follows parameters of stages 0, 1 and is in stage 0"),
        (Backward(layers=()), r"Silent of local module 0 .* does not say by follows\(\) which parameters it reads"),
    ):
        with pytest.raises(ValueError, match=message):
            LocalStep(network(rule), sgd, mesh=mesh(2))

    net = network(RULES["man"])
    step = LocalStep(net, sgd, mesh=mesh(2))
    step(*BATCHES[0])
    if rank == 1:
        with torch.no_grad():
            next(p for p in net.parameters() if not p.is_meta).add_(1)
        with pytest.raises(RuntimeError, match="have changed since the last step, and stage 0 has received them"):
            step(*BATCHES[1])


@pytest.mark.slow
def test_what_cannot_be_sent_is_refused():
    run(2, _refusals)


def language_model(rule):
    torch.manual_seed(7)
    example = torch.zeros(1, LENGTH, dtype=torch.int64)
    layers = nn.Sequential(*decoder(norm=nn.LayerNorm)).double()
    return LocalSequential(layers, rule, task=LanguageModelling(VOCABULARY), modules=3, example_input=example)


def _train_language(rank, wanted):
    for rule, (state, losses) in wanted:
        net = language_model(rule)
        step = LocalStep(net, sgd, mesh=mesh(3))
        stage = step._processes.stage
        ours = [step(*tokens(seed=u)).module_losses for u in range(6)]
        assert torch.equal(torch.stack(ours), losses[:, stage.first : stage.last + 1])
        assert_held(net, state, rule)
        step.close()


@pytest.mark.slow
def test_a_shared_readout_over_stages():
    """SOLO's last readout reaches earlier stages, at once and with a lag."""
    wanted = []
    for rule in (SOLO(1), SOLO(1, every=2, lag=2)):
        net = language_model(rule)
        step = LocalStep(net, sgd)
        losses = [step(*tokens(seed=u)).module_losses for u in range(6)]
        wanted.append((rule, (net.state_dict(), torch.stack(losses))))
    run(3, _train_language, wanted)

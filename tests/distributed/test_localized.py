"""``LocalStep`` on localized models among several processes: shards and stages of a model's own forward."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from language import VOCABULARY, decoder, tokens
from ranks import run
from replicated import mesh as replicas
from replicated import sgd
from test_shards import assert_equal, held_bytes
from test_stages import mesh as grid
from test_step_checkpoint import by_name
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from auglocal_ext import MAN, AugLocal, ContSup, Greedy, InfoPro, LanguageModelling, LocalStep, PredSim, localize
from auglocal_ext.nn import deferred

sys.path.append(str(Path(__file__).parents[1] / "localize"))

SHAPE = (3, 8, 8)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp, self.scale = nn.Linear(width, width), nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.constant_(self.scale, 0.5)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.scale * F.gelu(self.mlp(x))


class Vit(nn.Module):
    """Tokens and positions are parameters of the model itself; what the last lines use is made in the first."""

    def __init__(self, width=8, depth=3):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.register_buffer("steps", torch.arange(width * 1.0))
        self.gain = nn.Parameter(torch.randn(width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 5)

    def forward(self, x):
        gain = torch.cos(self.steps * self.gain)
        x = torch.cat([self.token.expand(len(x), -1, -1), self.patch(x).flatten(2).mT], 1) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0] * gain)


def vit(rule=None, seed=7, **options):
    torch.manual_seed(seed)
    rule = AugLocal(2) if rule is None else rule
    return localize(Vit(), rule, 5, input_shape=SHAPE, layout="class_token", **options)


def batches(world, steps=3):
    """For each step the parts of a batch, one per replica."""
    generator = torch.Generator().manual_seed(11)
    for _ in range(steps):
        x, y = (
            torch.randn(4 * world, *SHAPE, generator=generator),
            torch.randint(0, 5, (4 * world,), generator=generator),
        )
        yield list(zip(x.chunk(world), y.chunk(world), strict=True))


def _sharded(rank, make, **options):
    sharded, plain = make(seed=7 + rank), make(seed=7 + rank)
    steps = [LocalStep(net, sgd, mesh=replicas(2), shard=net is sharded, **options) for net in (sharded, plain)]
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    for batch in batches(2):
        outs = [step(*batch[rank]) for step in steps]
        assert torch.equal(outs[0].module_losses, outs[1].module_losses)
    assert_equal(sharded.state_dict(), plain.state_dict(), exactly=True)
    assert_equal(by_name(steps[0]), by_name(steps[1]), exactly=True)
    x = batch[rank][0]
    sharded.eval(), plain.eval()
    with torch.inference_mode():
        assert torch.equal(steps[0].predict(x), plain(x))
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    with pytest.raises(
        RuntimeError, match="holds shards of the network, so .* cannot run by itself: infer by step.pre"
    ):
        sharded.primary(x)
    return steps


def resnet(rule=None, seed=7, **options):
    torchvision = pytest.importorskip("torchvision", exc_type=Exception, reason="needs torchvision")
    torch.manual_seed(seed)
    rule = AugLocal(2) if rule is None else rule
    return localize(
        torchvision.models.resnet18(num_classes=5),
        rule,
        5,
        ["layer1", "layer2.0", "layer3"],
        input_shape=SHAPE,
        **options,
    )


class Recurrent(nn.Module):
    """An LSTM, which has its parameters in a list too, and two linear layers of one weight."""

    def __init__(self):
        super().__init__()
        self.embed, self.lstm = nn.Linear(24, 6), nn.LSTM(6, 6, batch_first=True)
        self.one, self.two, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 5)
        self.two.weight = self.one.weight

    def forward(self, x):
        x, _ = self.lstm(self.embed(x.flatten(1).unflatten(1, (8, 24))))
        x = torch.tanh(self.two(torch.tanh(self.one(x))))
        return self.head(x.mean(1))


def convolutions(rule=None, seed=7, **options):
    import odd_models as odd

    torch.manual_seed(seed)
    rule = ContSup("R1E") if rule is None else rule
    return localize(odd.Blocks(), rule, 5, 3, input_shape=SHAPE, **options)


def recurrent(rule=None, seed=7):
    torch.manual_seed(seed)
    rule = Greedy() if rule is None else rule
    return localize(Recurrent(), rule, 5, ["embed", "lstm"], input_shape=SHAPE, layout="channels_last")


def _two(rank):
    _sharded(rank, vit)


def test_a_sharded_model_equals_replicas():
    run(2, _two)


def _more(rank):
    _sharded(rank, partial(vit, PredSim()), recompute="all")
    _sharded(rank, convolutions)
    _sharded(rank, resnet)
    _sharded(rank, partial(convolutions, MAN(), fused=True))
    _sharded(rank, recurrent)
    _memory(rank)
    _from_nothing(rank)


@pytest.mark.slow
def test_other_sharded_models():
    run(2, _more)


def _memory(rank):
    """While a segment runs, its parameters are whole and no others."""
    net = vit()
    modules = net.local_modules
    sizes = [sum(p.numel() * p.element_size() for p in module.parameters()) for module in modules]
    rows = [sum(p[:1].numel() * p.element_size() for p in module.parameters()) for module in modules]  # of padding
    step = LocalStep(net, sgd, mesh=replicas(2), shard=True)
    at_rest = [held_bytes(module.parameters()) for module in modules]
    seen = []

    def look_in_backward(index, part, args, out):
        out.register_hook(lambda _: seen.append((index, [held_bytes(module.parameters()) for module in modules])))

    for index, part in enumerate((net.primary.patch, net.primary.blocks[0], net.primary.norm)):
        part.register_forward_hook(partial(look_in_backward, index))
    step(*next(batches(2))[rank])
    assert [index for index, _ in seen] == list(range(len(modules)))
    for index, held in seen:
        assert sizes[index] <= held.pop(index) <= sizes[index] + rows[index]
        assert held == [size for k, size in enumerate(at_rest) if k != index]
    state = held_bytes(t for s in step.optimizer.state.values() for t in s.values())
    for size in (sum(at_rest), state):
        assert abs(size - sum(sizes) / 2) <= sum(rows) / 2


def _from_nothing(rank):
    """Of a deferred model a process never has more than its shards and one segment."""
    with deferred(seed=3):
        net = vit()
    with deferred(seed=3):
        expected = vit()
    with deferred(seed=3):
        staged = vit()
    LocalStep(net, sgd, mesh=replicas(2), shard=True)
    expected.materialise("cpu")
    assert_equal(net.state_dict(), expected.state_dict(), exactly=True)
    step = LocalStep(staged, sgd, mesh=grid(2))
    ours = {id(p) for module in step._modules for p in module.parameters()}
    assert all(p.is_meta != (id(p) in ours) for p in staged.parameters())
    held = {name: value for name, value in staged.state_dict().items() if not value.is_meta}
    assert_equal(held, {name: expected.state_dict()[name] for name in held}, exactly=True)
    step.close()


RULES = {
    "auglocal": (resnet, AugLocal(2)),
    "man": (convolutions, MAN()),
    "tokens": (vit, AugLocal(2)),
    "predsim": (vit, PredSim()),
    "contsup": (convolutions, ContSup("R1E")),
    "infopro": (convolutions, InfoPro((0.5, 1.0), (1.0, 0.5))),
    "greedy": (recurrent, Greedy()),
}


def _stages(rank, wanted):
    for name, (state, losses, output) in wanted.items():
        make, rule = RULES[name]
        net = make(rule)
        step = LocalStep(net, sgd, mesh=grid(2), stage_cuts=(1,))
        stage = step._processes.stage
        ours = torch.stack([step(*batch).module_losses for (batch,) in batches(1)])
        assert torch.equal(ours, losses[:, stage.first : stage.last + 1]), name
        held = {key: value for key, value in net.state_dict().items() if not value.is_meta}
        assert_equal(held, {key: state[key] for key in held}, exactly=True)
        ours = {id(p) for module in step._modules for p in module.parameters()}
        assert all(p.is_meta != (id(p) in ours) for p in net.parameters()), name
        lists = [(m._flat_weights, m.bias_hh_l0) for m in net.modules() if isinstance(m, nn.LSTM)]
        assert all(weight.is_meta == parameter.is_meta for weights, parameter in lists for weight in weights)
        net.eval()
        ((x, _),) = next(batches(1))
        found = step.predict(x)
        assert found is None or torch.equal(found, output)
        with pytest.raises(RuntimeError, match="holds local modules . to . of the network, so .* cannot run by itself"):
            net.primary(x)
        step.close()


@pytest.mark.slow
def test_two_stages_equal_one_process():
    wanted = {}
    for name, (make, rule) in RULES.items():
        net = make(rule)
        step = LocalStep(net, sgd)
        losses = torch.stack([step(*batch).module_losses for (batch,) in batches(1)])
        net.eval()
        ((x, _),) = next(batches(1))
        with torch.no_grad():
            wanted[name] = (net.state_dict(), losses, net(x))
    run(2, _stages, wanted)


def language():
    torch.manual_seed(7)
    return localize(decoder(), Greedy(), None, 2, task=LanguageModelling(VOCABULARY), example_input=tokens()[0][:1])


def _languages(rank, wanted):
    """The readout's weight, which the loss takes, is a shard, or belongs to another process."""
    staged = LocalStep(language(), sgd, mesh=grid(2))
    for u, losses in enumerate(wanted):
        assert torch.equal(staged(*tokens(seed=u)).module_losses, losses[rank : rank + 1])
    staged.close()
    nets = language(), language()
    steps = [LocalStep(net, sgd, mesh=replicas(2), shard=net is nets[0]) for net in nets]
    for u in range(2):
        outs = [step(*tokens(seed=2 * u + rank)) for step in steps]
        assert torch.equal(outs[0].module_losses, outs[1].module_losses)
        assert outs[0].output.shape[-1] == outs[1].output.shape[-1] == 0
    assert_equal(*(net.state_dict() for net in nets), exactly=True)


@pytest.mark.slow
def test_language_models():
    step = LocalStep(language(), sgd)
    run(2, _languages, [step(*tokens(seed=u)).module_losses for u in range(2)])


BATCHES = [batch for (batch,) in batches(1)]


def _goes_on(shape, folder, name, expected, saved_as, **options):
    """Load at this mesh, save what was loaded, and finish the run. All replicas see one batch."""
    with torch.device("meta"):
        net = vit()
    step = LocalStep(net, sgd, mesh=shape, **options)
    step.load(folder / name)
    step.save(folder / saved_as)
    step(*BATCHES[2])
    held = {name: value for name, value in net.state_dict().items() if not value.is_meta}
    assert len(held) > 10
    assert_equal(held, {name: expected[0][name] for name in held}, exactly=True)
    ours = by_name(step)
    assert_equal(ours, {key: expected[1][key] for key in ours}, exactly=True)
    step.close()


def _resumed(rank, folder, expected):
    _goes_on(replicas(2), folder, "one", expected, "shards", shard=True)
    _goes_on(grid(2), folder, "shards", expected, "stages")
    _goes_on(replicas(2), folder, "stages", expected, "again", shard=True)


@pytest.mark.slow
def test_checkpoints_go_among_shards_stages_and_one_process(tmp_path):
    step = LocalStep(vit(), sgd)
    for batch in BATCHES[:2]:
        step(*batch)
    step.save(tmp_path / "one")
    step(*BATCHES[2])
    run(2, _resumed, tmp_path, (step.net.state_dict(), by_name(step)))
    other = LocalStep(vit(seed=8), sgd)
    other.load(tmp_path / "again")
    other(*BATCHES[2])
    assert_equal(other.net.state_dict(), step.net.state_dict(), exactly=True)
    model = Vit()
    model.load_state_dict(other.net.primary.state_dict())  # the model's own names
    x, _ = BATCHES[0]
    assert torch.equal(model.eval()(x), step.net.eval().primary(x))

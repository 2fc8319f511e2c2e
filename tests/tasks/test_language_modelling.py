"""Language modelling: every module's gradients are those of the literal loss, no logits exist, no position leaks."""

from __future__ import annotations

import math

import pytest
import torch
from language import LENGTH, VOCABULARY, WIDTH, Made, decoder, literal_loss, tokens, wrapped
from torch import nn

from auglocal_ext import (
    DGL,
    MAN,
    AugLocal,
    Balanced,
    ContSup,
    Greedy,
    InfoPro,
    LanguageModelling,
    LocalSequential,
    LocalStep,
    PredSim,
    Segmentation,
)
from auglocal_ext.cost import count_macs, count_training_macs
from auglocal_ext.nn import eager_type
from auglocal_ext.planning import plan_memory
from auglocal_ext.rules import LinearHead

RULES = {
    "greedy": (Greedy(), [1, 3]),
    "greedy-0c2f": (Greedy(head="0c2f"), [0, 2, 3]),
    "auglocal": (AugLocal(depth=2), [0, 2]),
    "auglocal-deep": (AugLocal(depth=4), [1]),
    "auglocal-layers": (AugLocal(depth=2), None),
    "auglocal-sequential": (AugLocal(depth=2, sampling="sequential"), [0, 2]),
    "contsup": (ContSup("R0", head="linear"), [1, 3]),
    "man": (MAN(head="linear"), [1, 2]),
}
_SLOW = ("greedy-0c2f", "auglocal-deep", "auglocal-layers", "auglocal-sequential", "contsup")
rules = pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in _SLOW)) for n in RULES])
recomputing = pytest.mark.parametrize("recompute", ["none", pytest.param("all", marks=pytest.mark.slow)])


def net_of(name, **options):
    rule, modules = RULES[name]
    return wrapped(rule, modules, **options)


def literal_losses(net, x, y, **options):
    """Each module's loss by all its logits, in the network's order."""
    losses, h, history = [], x, []
    for module in net.local_modules:
        out = module(h, history)
        logits = out if module.auxiliary is None else module.auxiliary(out)
        losses.append(literal_loss(logits, y, **options))
        h = module.hand_on(out)
    return losses


@rules
@recomputing
def test_gradients_are_those_of_the_literal_loss(name, recompute):
    task = LanguageModelling(VOCABULARY, label_smoothing=0.1, z_loss=0.01)
    net = net_of(name, task=task, layers=decoder().double(), recompute=recompute)
    x, y = tokens()
    losses = literal_losses(net, x, y, smoothing=0.1, z=0.01)
    parameters = {name: p for name, p in net.named_parameters() if p.requires_grad}
    expected = torch.autograd.grad(sum(losses), list(parameters.values()), allow_unused=True)
    out = net(x, y)
    out.loss.backward()
    torch.testing.assert_close(out.module_losses, torch.stack(losses).detach(), rtol=1e-12, atol=1e-12)
    for (name, parameter), grad in zip(parameters.items(), expected, strict=True):
        assert (parameter.grad is None) == (grad is None), name
        if grad is not None:
            torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-12, msg=name)


@rules
def test_each_loss_trains_its_own_module_alone(name):
    net = net_of(name)
    x, y = tokens()
    everything = {name: p for name, p in net.named_parameters() if p.requires_grad}
    h, history = x, []
    for module in net.local_modules:
        out = module(h, history)
        grads = torch.autograd.grad(module.local_loss(out, y, x), list(everything.values()), allow_unused=True)
        trained = {name for name, grad in zip(everything, grads, strict=True) if grad is not None}
        mine = {id(p) for p in module.parameters() if p.requires_grad}
        assert trained == {name for name, p in everything.items() if id(p) in mine}
        h = module.hand_on(out)


@rules
def test_no_output_depends_on_later_tokens(name):
    """In training mode, in which a statistic over positions would leak."""
    net = net_of(name, layers=decoder(norm=nn.LayerNorm))
    x, _ = tokens()
    position = 4
    later = x.clone()
    later[:, position + 1 :] = (x[:, position + 1 :] + 1) % VOCABULARY
    h, changed, history, other = x, later, [], []
    for module in net.local_modules:
        h, changed = module(h, history), module(changed, other)
        outputs = [each if module.auxiliary is None else module.auxiliary(each) for each in (h, changed)]
        torch.testing.assert_close(outputs[0][:, : position + 1], outputs[1][:, : position + 1])
        assert not torch.equal(outputs[0][:, position + 1 :], outputs[1][:, position + 1 :])


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "smoothed"])
def test_one_module_is_backpropagation(weighted):
    options = {"label_smoothing": 0.2, "z_loss": 0.1} if weighted else {}
    net = wrapped(Greedy(), 1, decoder().double(), LanguageModelling(VOCABULARY, **options))
    x, y = tokens()
    loss = literal_loss(net.primary(x), y, *options.values())
    expected = torch.autograd.grad(loss, list(net.parameters()))
    out = net(x, y)
    out.loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=0)
    for parameter, grad in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-9, atol=1e-13)


@rules
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_no_logits_are_made(name, training):
    net = net_of(name)
    x, y = tokens()
    with Made() as made:
        net.primary(x)
    assert 3 * LENGTH * VOCABULARY in made.sizes  # which no other tensor has
    with Made() as made, torch.set_grad_enabled(training):
        out = net(x, y)
        if training:
            out.loss.backward()
        net.score(x, y)
        net.task.score_of(net.primary, x, y)
    assert 3 * LENGTH * VOCABULARY not in made.sizes
    assert out.output.shape == (3, LENGTH, 0)


def test_loss_and_counts_of_a_test_batch_are_those_of_its_logits():
    net = wrapped(Greedy(), 2, task=LanguageModelling(VOCABULARY, z_loss=0.1)).eval()
    x, y = tokens()
    with torch.no_grad():
        expected = net.task.score(net(x), y)
    for found in (net.score(x, y), net.task.score_of(net.primary, x, y)):
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.tally.float(), expected.tally.float())  # sums that were made in float32
    assert not net.score(x, y).loss.requires_grad


def test_a_readout_that_does_more_than_its_product_is_called():
    """Hooks, activations after it and layers of one's own: then there are logits."""
    layers = decoder()
    seen = []
    layers[-1].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    net = wrapped(Greedy(), 2, layers)
    seen.clear()
    x, y = tokens()
    out = net(x, y)
    assert seen == [(3, LENGTH, VOCABULARY)] and out.output.shape == (3, LENGTH, VOCABULARY)
    torch.testing.assert_close(out.module_losses[-1], literal_loss(net(x), y).detach())
    other = wrapped(Greedy(), 2, nn.Sequential(*decoder(), nn.Tanh()))
    assert other(x, y).output.shape == (3, LENGTH, VOCABULARY)


def test_a_readout_inside_a_container():
    layers = decoder()
    nested = nn.Sequential(*layers[:-2], nn.Sequential(layers[-2], nn.Sequential(layers[-1])))
    x, y = tokens()
    plain, inside = wrapped(Greedy(), 2, layers), wrapped(Greedy(), 2, nested)
    inside.auxiliary.load_state_dict(plain.auxiliary.state_dict())
    found, expected = inside(x, y), plain(x, y)
    assert found.output.shape == (3, LENGTH, 0)
    assert torch.equal(found.module_losses, expected.module_losses)


def test_a_loss_of_ones_own_gets_logits():
    class Doubled(LanguageModelling):
        def loss(self, output, target):
            return 2 * super().loss(output, target)

    x, y = tokens()
    net, plain = wrapped(Greedy(), 2, task=Doubled(VOCABULARY)), wrapped(Greedy(), 2)
    plain.load_state_dict(net.state_dict())
    found = net(x, y)
    assert found.output.shape == (3, LENGTH, VOCABULARY)
    torch.testing.assert_close(found.module_losses, 2 * plain(x, y).module_losses)


@rules
def test_a_batch_of_ignored_positions_changes_nothing(name):
    net = net_of(name)
    x, y = tokens()
    out = net(x, torch.full_like(y, -100))
    out.loss.backward()
    assert not out.module_losses.any() and not out.module_counts.any()
    assert not any(p.grad is not None and p.grad.any() for p in net.parameters())
    assert net.task.measure(out.module_counts, net.task.counted(torch.full_like(y, -100))).isnan().all()


def test_metrics():
    task, (_, y) = LanguageModelling(VOCABULARY, label_smoothing=0.3, z_loss=1.0), tokens()
    logits = torch.randn(3, LENGTH, VOCABULARY)
    counts, counted = task.count(logits, y), task.counted(y)
    nll = literal_loss(logits, y).double()
    assert int(counted) == 3 * LENGTH - 2 and counts.dtype == torch.float64
    torch.testing.assert_close(task.measure(counts, counted), nll.exp())
    torch.testing.assert_close(task.bits_per_byte(counts, counted), nll / math.log(2))
    torch.testing.assert_close(task.bits_per_byte(counts, counted, 4.0), nll / math.log(2) / 4)
    right = (logits.argmax(-1) == y) & (y != -100)
    torch.testing.assert_close(task.accuracy(counts, counted), right.sum().double() / counted)
    several = torch.stack([counts, 2 * counts])
    assert task.measure(several, 2 * counted).shape == (2,)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_targets_of_other_integers(dtype):
    net = wrapped(Greedy(), 2)
    x, y = tokens()
    y = y.clamp(min=0)
    assert torch.equal(net(x, y.to(dtype)).module_losses, net(x, y).module_losses)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.int64), ValueError, r"tokens \(3, T\)"),
        (torch.zeros(3, LENGTH), TypeError, r"target\.long\(\)"),
        (torch.zeros(2, LENGTH, dtype=torch.int64), ValueError, "one target per input"),
        (torch.full((3, LENGTH), VOCABULARY), ValueError, r"token 11 at \(sample, position\) \(0, 0\)"),
        (torch.zeros(3, LENGTH - 1, dtype=torch.int64), ValueError, "a target per position"),
    ],
    ids=["one-each", "floating", "samples", "range", "length"],
)
def test_wrong_targets_are_explained(target, error, message):
    with pytest.raises(error, match=message):
        wrapped(Greedy(), 2)(tokens()[0], target)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (PredSim(), "needs task=Classification"),
        (InfoPro((5, 0.5), (1, 1)), "images"),
        (ContSup("R1", head="linear"), "needs images"),
        (DGL(), "pools tokens.*take 'linear'"),
        (Greedy(head="vgg"), "pools tokens.*take 'linear'"),
        (Greedy(head="1c2f"), "needs feature maps"),
        (Greedy(head="fcn"), "needs feature maps"),
        (Greedy(head=LinearHead(norm=True)), "statistics over all positions"),
        (AugLocal(depth=2, single_layer_norm=True), "statistics over all positions.*single_layer_norm"),
    ],
    ids=["predsim", "infopro", "contsup", "dgl", "vgg", "conv", "fcn", "norm", "auglocal-norm"],
)
def test_what_would_mix_positions_is_refused(rule, message):
    with pytest.raises(ValueError, match=message):
        wrapped(rule, 2)


def test_a_class_token_is_refused():
    with pytest.raises(ValueError, match="not tokens of which each is read"):
        wrapped(Greedy(), 2, layout="class_token")


class Halved(nn.Module):
    """Every second token."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, h):
        return self.mix(h[:, ::2])


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(WIDTH, WIDTH)

    def forward(self, h):
        return self.mix(h.repeat_interleave(2, 1)[:, :LENGTH])


def test_a_copy_that_needs_another_number_of_positions_is_refused():
    layers = decoder()
    layers = nn.Sequential(layers[0], layers[1], Halved(), layers[2], Doubled(), *layers[3:])
    with pytest.raises(ValueError, match="pooling them would mix positions"):
        wrapped(AugLocal(depth=3), [1], layers)


def test_heads_are_the_networks_readout_made_anew():
    rms = wrapped(Greedy(), 2).auxiliary[0].head
    assert eager_type(rms.norm) is nn.RMSNorm and rms.linear.bias is None
    layer = wrapped(Greedy(), 2, decoder(norm=nn.LayerNorm, bias=True)).auxiliary[0].head
    assert eager_type(layer.norm) is nn.LayerNorm and layer.linear.bias is not None
    copied = wrapped(AugLocal(depth=2), [1]).auxiliary[0]
    assert copied.head.norm is None and eager_type(list(copied.blocks.modules())[-1]) is nn.RMSNorm
    repeated = wrapped(AugLocal(depth=2, sampling="sequential"), [1]).auxiliary[0]
    assert eager_type(repeated.head.norm) is nn.RMSNorm


@pytest.mark.parametrize("tied", [False, True])
def test_it_learns(tied):
    layers = decoder()
    if tied:
        layers[-1].weight = layers[0].weight
        with pytest.warns(UserWarning, match="share a parameter"):
            net = wrapped(AugLocal(depth=2), [1], layers)
    else:
        net = wrapped(AugLocal(depth=2), [1], layers)
    step = LocalStep(net, lambda params: torch.optim.AdamW(params, lr=3e-2))
    x = torch.arange(LENGTH).expand(4, LENGTH) % VOCABULARY
    for _ in range(30):
        out = step(x, (x + 1) % VOCABULARY)
    perplexity = net.task.measure(out.module_counts, net.task.counted(x))
    assert perplexity.shape == (2,) and bool((perplexity < 2).all())


@pytest.mark.parametrize("replayed", [LanguageModelling, Segmentation])
def test_a_stage_without_a_batch_counts_nothing_in_the_tasks_shape(replayed):
    """With a delay later stages begin later; the counts of all are one tensor."""
    if replayed is LanguageModelling:
        net, (x, y) = wrapped(Greedy(), 2), tokens()
    else:
        layers = nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in range(3)))
        net = LocalSequential(layers, Greedy(), task=Segmentation(3), modules=2, input_shape=(3, 4, 4))
        x, y = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.int64)
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.1), stage_cuts=(1,), delay=1)
    first, second = step(x, y), step(x, y)
    assert first.module_counts.shape == second.module_counts.shape == (2, *net.task.count_shape)
    assert bool((first.module_counts[1] == -1).all()) and bool((second.module_counts >= 0).all())
    assert net.task.measure(first.module_counts, 5)[1].isnan()


def test_autocast_to_bfloat16():
    net = wrapped(AugLocal(depth=2), [1])
    x, y = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, y)
    out.loss.backward()
    torch.testing.assert_close(out.module_losses, net(x, y).module_losses, rtol=0.05, atol=0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.slow
def test_costs_plans_and_cuts_without_data():
    net = wrapped(AugLocal(depth=2), [1])
    greedy = wrapped(Greedy(), 3)
    readout = LENGTH * WIDTH * VOCABULARY
    assert count_training_macs(greedy, (LENGTH,)) == count_macs(greedy, (LENGTH,)) + 2 * readout
    plan = plan_memory(net, 2, lambda params: torch.optim.SGD(params, lr=0.1))
    assert plan is not None
    assert wrapped(Greedy(), Balanced(2, by="flops")).num_modules == 2

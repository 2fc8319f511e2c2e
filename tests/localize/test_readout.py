"""The last module of a localized language model: loss and gradients without its logits, wherever that is equal."""

from __future__ import annotations

import copy
import warnings
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from language import LENGTH, VOCABULARY, WIDTH, Attending, Made, literal_loss, tokens
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from auglocal_ext import Greedy, LanguageModelling, LocalSequential, LocalStep, localize, models
from auglocal_ext.memory import MemoryMeter
from auglocal_ext.planning import plan_memory

SIZE = 3 * LENGTH * VOCABULARY  # of the logits, which no other tensor has


def same(logits):
    return logits


class Decoder(nn.Module):
    """Its logits go through ``self.end``, a plain function."""

    def __init__(self, end=same, bias=False, tied=False):
        super().__init__()
        self.end = end
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Attending(WIDTH) for _ in range(3))
        self.norm = nn.RMSNorm(WIDTH)
        self.readout = nn.Linear(WIDTH, VOCABULARY, bias=bias)
        if tied:
            self.readout.weight = self.embedding.weight

    def forward(self, ids):
        h = self.embedding(ids)
        for block in self.blocks:
            h = block(h)
        return {"ids": ids, "logits": self.end(self.readout(self.norm(h)))}


def localized(model, modules=2, output="logits", task=None, **options):
    task = LanguageModelling(VOCABULARY) if task is None else task
    example = torch.zeros(1, LENGTH, dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "local modules .* share a parameter")
        return localize(model, Greedy(), None, modules, task=task, example_input=example, output=output, **options)


def decoder(**options):
    torch.manual_seed(0)
    return Decoder(**options).double()


def expected(net, x, y, **options):
    """Losses by all logits, and their gradients."""
    losses, h = [], x
    for module in net.local_modules:
        out = module(h)
        losses.append(literal_loss(out if module.auxiliary is None else module.auxiliary(out), y, **options))
        h = module.hand_on(out)
    return torch.stack(losses).detach(), torch.autograd.grad(sum(losses), list(net.parameters()))


def assert_literal(net, waits, **options):
    """Loss and gradients are the literal ones; ``waits``: no logits are made."""
    x, y = tokens()
    losses, gradients = expected(net, x, y, **options)
    with Made() as made:
        out = net(x, y)
        out.loss.backward()
    assert (SIZE not in made.sizes) == waits
    assert out.output.shape == (3, LENGTH, 0 if waits else VOCABULARY)
    torch.testing.assert_close(out.module_losses, losses, rtol=1e-12, atol=1e-12)
    for (name, parameter), gradient in zip(net.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12, msg=name)
    net.zero_grad()


@pytest.mark.parametrize("recompute", ["none", "all", 1])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"tied": True}], ids=["plain", "bias", "tied"])
def test_loss_and_gradients_are_those_of_the_logits(options, recompute):
    task = LanguageModelling(VOCABULARY, label_smoothing=0.1, z_loss=0.01)
    assert_literal(localized(decoder(**options), task=task, recompute=recompute), True, smoothing=0.1, z=0.01)


@pytest.mark.parametrize("fused", [False, True])
def test_one_module_a_sequential_and_containers(fused):
    torch.manual_seed(0)
    own = models.gpt(3, 8, 2, VOCABULARY, LENGTH).double()
    nested = nn.Sequential(*own[:-2], nn.Sequential(own[-2], nn.Sequential(own[-1])))
    for model, modules in ((decoder(), 1), (own, 2), (nested, 2)):
        assert_literal(localized(model, modules, "logits" if modules == 1 else None, fused=fused), True)


def test_everything_but_training_and_score_has_logits():
    net = localized(decoder())
    x, y = tokens()
    net(x, y).loss.backward()
    module, before = net.local_modules[1], net.local_modules[0](x)
    assert module(before).shape == (3, LENGTH, VOCABULARY)
    torch.testing.assert_close(module.local_loss(module(before), y), net(x, y).module_losses[1])
    for mode in (True, False):
        net.train(mode)
        for each in (net(x), net.primary(x)["logits"], net.export()(x)["logits"]):
            assert type(each) is torch.Tensor and each.shape == (3, LENGTH, VOCABULARY)
        with Made() as made:
            found = net.score(x, y)
        assert SIZE not in made.sizes
        wanted = net.task.score(net(x), y)
        torch.testing.assert_close(found.loss, wanted.loss)
        torch.testing.assert_close(found.tally, wanted.tally)
    assert "_compiled_call_impl" not in vars(net.primary.readout)


def halved(logits):
    return logits / 2


def halved_in_place(logits):
    return logits.mul_(0.5)


def capped(logits):
    return 5 * torch.tanh(logits / 5)


class Half(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x / 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient / 2


def single(logits):
    return logits.float().double()


def read(logits):
    with torch.no_grad():
        logits.isfinite().all()
    return logits


@pytest.mark.parametrize("end", [halved, halved_in_place, capped, Half.apply, single, read])
def test_what_the_model_does_with_its_logits_makes_them(end):
    assert_literal(localized(decoder(end=end)), False)


@pytest.mark.parametrize("end", [halved, halved_in_place, capped, single, read])
def test_what_it_does_only_since_it_was_cut_makes_them_too(end):
    net = localized(decoder())
    net.primary.end = end
    assert_literal(net, False)
    net.primary.end = same
    assert_literal(net, True)


def test_an_autograd_function_since_it_was_cut_is_refused():
    net = localized(decoder())
    net.primary.end = Half.apply
    with pytest.raises(RuntimeError, match="Decoder reads its logits without gradients.*localize the model again"):
        net(*tokens())


def test_sizes_of_the_logits_do_not_make_them():
    def sized(logits):
        assert logits.shape == logits.size() == (3, LENGTH, VOCABULARY) and logits.dim() == logits.ndim == 3
        assert logits.size(-1) == VOCABULARY and logits.device.type == "cpu"
        return logits

    net = localized(decoder())
    net.primary.end = sized
    assert_literal(net, True)


def test_other_outputs_that_are_made_of_logits():
    """The model keeps them, and returns more than is learned from."""

    def kept(logits):
        net.primary.kept = logits
        return logits

    net = localized(decoder())
    net.primary.end = kept
    x, y = tokens()
    net(x, y)
    torch.testing.assert_close(net.primary.kept + 0, net(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def own_class(model):
    model.readout.__class__ = Doubled


def own_forward(model):
    model.readout.forward = MethodType(lambda self, x: 2 * F.linear(x, self.weight), model.readout)


def hook(model):
    model.readout.register_forward_hook(lambda module, args, out: 2 * out)


def pre_hook(model):
    model.readout.register_forward_pre_hook(lambda module, args: (2 * args[0],))


def hook_of_the_model(model):
    model.register_forward_hook(lambda module, args, out: {"logits": 2 * out["logits"]})


def parametrized(model):
    torch.nn.utils.parametrizations.weight_norm(model.readout)


@pytest.mark.parametrize("change", [own_class, own_forward, hook, pre_hook, hook_of_the_model, parametrized])
def test_a_layer_that_does_more_than_its_product_is_called(change):
    model = decoder()
    change(model)
    assert_literal(localized(model), False)
    if change is not parametrized:  # whose parameters would be others
        net = localized(decoder())
        change(net.primary)
        assert_literal(net, False)


def test_a_compiled_layer_is_called():
    net = localized(decoder())
    net.primary.readout.compile(backend="eager")
    assert_literal(net, False)


def test_global_hooks_see_the_layer():
    net, seen = localized(decoder()), []
    handle = register_module_forward_hook(lambda module, args, out: seen.append(type(module)) or None)
    try:
        assert_literal(net, False)
    finally:
        handle.remove()
    assert nn.Linear in seen


class ByName(Decoder):
    def forward(self, ids):
        return {"logits": self.readout(input=self.blocks[1](self.blocks[0](self.embedding(ids))))}


class Twice(Decoder):
    """The readout is called before the last module too."""

    def forward(self, ids):
        h = self.embedding(ids)
        h = self.blocks[0](h + self.readout(h).mean(-1, keepdim=True))
        return {"logits": self.readout(self.blocks[1](h))}


class Flat(Decoder):
    def forward(self, ids):
        h = self.blocks[1](self.blocks[0](self.embedding(ids)))
        return {"logits": self.readout(h.flatten(0, 1)).unflatten(0, ids.shape)}


@pytest.mark.parametrize("kind", [ByName, Twice, Flat])
def test_other_calls_of_the_layer(kind):
    torch.manual_seed(0)
    model = kind().double()
    for part in (model.blocks[2], model.norm):
        part.requires_grad_(False)
    net = localized(model)
    x, y = tokens()
    out = net(x, y)
    assert out.output.shape == (3, LENGTH, VOCABULARY)
    before = net.local_modules[0](x)
    torch.testing.assert_close(out.module_losses[1], literal_loss(net.local_modules[1](before), y).detach())


def test_a_loss_of_ones_own_gets_logits():
    class Literal(LanguageModelling):
        def loss(self, output, target):
            return super().loss(output, target)

    assert_literal(localized(decoder(), task=Literal(VOCABULARY)), False)


def test_autocast_is_that_of_our_own_networks():
    torch.manual_seed(0)
    own = models.gpt(3, 8, 2, VOCABULARY, LENGTH)
    nets = [
        localized(copy.deepcopy(own), [1], None),
        LocalSequential(
            copy.deepcopy(own),
            Greedy(),
            task=LanguageModelling(VOCABULARY),
            modules=[1],
            example_input=tokens()[0][:1],
            fused=False,
        ),
    ]
    nets[1].auxiliary.load_state_dict(nets[0].auxiliary.state_dict())
    found = []
    for net in nets:
        with torch.autocast("cpu", torch.bfloat16):
            out = net(*tokens())
        out.loss.backward()
        found.append([out.module_losses, *(parameter.grad for parameter in net.parameters())])
    assert all(map(torch.equal, *found))


def test_logits_that_autocast_makes_late_are_those_of_the_layers_call():
    """A cast that is none without autocast, and a region that switches it off."""

    def cast(logits):
        with torch.autocast("cpu", enabled=False):
            return logits.float()

    torch.manual_seed(0)
    net = localized(Decoder(end=cast))
    x, y = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        out = net(x, y)
        wanted = net.task.loss(net.local_modules[1](net.local_modules[0](x)), y)
    assert out.output.shape == (3, LENGTH, VOCABULARY)
    assert torch.equal(out.module_losses[1], wanted.detach())


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_the_predicted_peak_is_the_meters_and_has_no_logits(recompute):
    class Literal(LanguageModelling):
        def loss(self, output, target):
            return super().loss(output, target)

    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    peaks, (x, y) = [], (torch.zeros(32, LENGTH, dtype=torch.int64) for _ in range(2))
    for task in (LanguageModelling(2048), Literal(2048)):
        model = Decoder()
        model.embedding, model.readout = nn.Embedding(2048, WIDTH), nn.Linear(WIDTH, 2048, bias=False)
        net = localized(model, ["blocks.0"], task=task, recompute=recompute)
        plan = plan_memory(net, 32, sgd)
        step = LocalStep(net, sgd)
        step(x, y)
        with MemoryMeter() as meter:
            meter.track(net, step.optimizer, x, y)
            step(x, y)
        assert plan.predicted_bytes == meter.peak_bytes
        peaks.append(meter.peak_bytes)
    assert peaks[1] - peaks[0] >= 32 * LENGTH * 2048 * 4

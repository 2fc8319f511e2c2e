"""Recomputation changes memory, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from auglocal_ext import AugLocal, ContSup, LocalSequential, localize, models
from auglocal_ext.memory import MemoryMeter
from auglocal_ext.memory.meter import ACTIVATIONS
from auglocal_ext.nn import recomputed

RULES = {"auglocal": AugLocal(3), "contsup": ContSup("R2E")}


def wrap(rule, recompute, **options):
    torch.manual_seed(5)
    return LocalSequential(models.resnet_cifar(14, width=4), rule, 10, (3, 16, 16), recompute=recompute, **options)


def train(net, steps=3):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for step in range(steps):
        torch.manual_seed(100 + step)
        x, y = torch.randn(6, 3, 16, 16), torch.randint(0, 10, (6,))
        optimizer.zero_grad()
        out = net(x, y)
        out.loss.backward()
        optimizer.step()
    return out, net.state_dict()


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("modules", [None, 1, 3])
@pytest.mark.parametrize("recompute", ["auxiliary", "all"])
def test_equal_to_the_bit(rule, modules, recompute):
    """Weights, momenta's effect, and BatchNorm's running statistics and counters after three steps."""
    plain, expected = train(wrap(rule, "none", modules=modules))
    out, state = train(wrap(rule, recompute, modules=modules))
    assert torch.equal(out.module_losses, plain.module_losses) and torch.equal(out.logits, plain.logits)
    for key, value in state.items():
        assert torch.equal(value, expected[key]), key


def test_per_module():
    choice = ["all", "none", "auxiliary"]
    net = wrap(ContSup("R1"), choice, modules=3)
    assert [module.recompute for module in net.local_modules] == choice
    _, expected = train(wrap(ContSup("R1"), "none", modules=3))
    _, state = train(copy.deepcopy(net))
    for key, value in state.items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize(("modules", "recompute"), [(1, 4), (3, [2, 1, "all"]), (3, [3, 2, 1])])
def test_first_layers_equal_to_the_bit(rule, modules, recompute):
    _, expected = train(wrap(rule, "none", modules=modules), 2)
    _, state = train(wrap(rule, recompute, modules=modules), 2)
    for key, value in state.items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("fused", [True, False])
def test_a_number_is_that_of_the_first_layers_with_context_but_not_of_the_head(fused):
    net = wrap(ContSup("R1E"), [2, 1, 2], modules=3, fused=fused)
    assert net.recompute == (2, 1, 2) and [len(module.groups) for module in net.local_modules] == [3, 2, 2]
    runs = []
    for name, part in [*net.primary.named_children(), ("context", net.context["1"]), ("head", net.auxiliary[1])]:
        if name not in ("pool", "flatten"):
            next(part.modules()).register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    net(torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))).loss.backward()
    children = [[name for name, _ in net.primary.named_children()][layer.start] for layer in net.network.layers]
    again = {name for name in runs if runs.count(name) > 1}
    assert again >= {children[i] for i in (0, 1, 3, 5, 6)} | {"context"}
    assert not again & {children[2], children[4], "head"}


def test_numbers_in_parts_of_a_model():
    def gradients(recompute):
        torch.manual_seed(5)
        net = localize(models.resnet_cifar(8, width=4), AugLocal(2), 10, 2, input_shape=(3, 16, 16))
        net.recompute = recompute
        torch.manual_seed(9)
        net(torch.randn(6, 3, 16, 16), torch.randint(0, 10, (6,))).loss.backward()
        return {name: tensor.grad for name, tensor in net.named_parameters()} | dict(net.named_buffers())

    expected = gradients("none")
    for name, value in gradients([1, 1]).items():
        assert torch.equal(value, expected[name]), name


def test_dropout_repeats():
    def run(recompute):
        torch.manual_seed(5)
        stages = [m for i in (3, 8) for m in (nn.Conv2d(i, 8, 3), nn.Dropout(0.5), nn.BatchNorm2d(8), nn.ReLU())]
        layers = nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(8, 10))
        net = LocalSequential(layers, ContSup("R0"), 10, (3, 16, 16), recompute=recompute)
        torch.manual_seed(9)
        net(torch.randn(6, 3, 16, 16), torch.randint(0, 10, (6,))).loss.backward()
        return {name: p.grad for name, p in net.named_parameters()}

    expected = run("none")
    for name, grad in run("all").items():
        assert torch.equal(grad, expected[name]), name


def test_autocast():
    def run(recompute):
        net = wrap(ContSup("R1E"), recompute)
        torch.manual_seed(9)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(torch.randn(6, 3, 16, 16), torch.randint(0, 10, (6,)))
        out.loss.backward()
        return {name: p.grad for name, p in net.named_parameters()}

    expected = run("none")
    for name, grad in run("all").items():
        assert torch.equal(grad, expected[name]), name


def test_no_grad_and_inference_run_once():
    net = wrap(ContSup("R1E"), "all")
    runs = []
    net.primary[1].register_forward_pre_hook(lambda *_: runs.append(1))
    x, y = torch.randn(4, 3, 16, 16), torch.randint(0, 10, (4,))
    with torch.no_grad():
        net(x, y)
        net(x)
    assert len(runs) == 2
    net(x, y)
    assert len(runs) == 4  # once more for its backward


def peak(network, rule, recompute, modules=None, batch=256):
    """Peak of what is neither parameter, gradient nor input, in bytes, on shapes alone."""
    with FakeTensorMode():
        net = LocalSequential(models.build(network), rule, 10, (3, 32, 32), modules, recompute=recompute)
        x, y = torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))
        with MemoryMeter() as meter:
            meter.track(net, x, y)
            net(x, y).loss.backward()
    return meter.peak_categories[ACTIVATIONS]


def test_it_saves_memory():
    none, auxiliary = (peak("resnet32", AugLocal(6), choice) for choice in ("none", "auxiliary"))
    assert auxiliary < 0.75 * none
    # an image encoder is run again as a whole and so stays the peak; many blocks in one module are where "all" pays
    none, everything = (peak("resnet32", ContSup("R0"), choice, modules=2) for choice in ("none", "all"))
    assert everything < 0.5 * none


def test_what_a_recomputed_layers_output_was_made_from_is_not_kept():
    def peak(fused, recompute):
        with FakeTensorMode():
            layers = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(5)), nn.Linear(64, 10))
            net = LocalSequential(layers, ContSup("R0"), 10, (64,), 1, recompute=recompute, fused=fused)
            with MemoryMeter() as meter:
                net(torch.randn(512, 64), torch.randint(0, 10, (512,))).loss.backward()
        return meter.peak_bytes

    assert peak(True, 4) <= peak(False, 4) < peak(False, "none")
    assert peak(True, "all") <= peak(False, "all")


@pytest.mark.parametrize("wrong", ["some", ["all"], ["all", "none", "some"], 0, -1, True, 1.5, None, [1, 1, True], 5])
def test_wrong_choices(wrong):
    with pytest.raises(
        (ValueError, TypeError),
        match="recompute is one of none, auxiliary, all, or a number n|names the first 5 layers of local module 0",
    ):
        wrap(ContSup("R0"), wrong, modules=3)


@pytest.mark.parametrize("capturing", [False, True])
def test_the_random_state_is_not_read_while_a_graph_is_captured(monkeypatch, capturing):
    class OnCuda(torch.Tensor):
        is_cuda = True

    asked = {}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr("auglocal_ext.nn.recompute.checkpoint", lambda run, *inputs, **options: asked.update(options))
    recomputed(nn.Identity(), torch.zeros(2).as_subclass(OnCuda))
    assert asked["preserve_rng_state"] is not capturing
    recomputed(nn.Identity(), torch.zeros(2))
    assert asked["preserve_rng_state"] is True

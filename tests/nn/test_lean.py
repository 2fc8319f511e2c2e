"""Layers of transformers after ``fuse``: results, what is kept, and what takes the source of an output away."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import weakref

import pytest
import torch
from lean_layers import WIDTH, Reads, assert_same, pair, tokens, widths
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from auglocal_ext import fuse, unfuse
from auglocal_ext.nn import lean_dropout, lean_norm, recomputed
from auglocal_ext.nn.lean import EAGER
from auglocal_ext.nn.lean_act import gated
from auglocal_ext.nn.lean_linear import FusedLinear
from auglocal_ext.nn.lean_norm import FusedLayerNorm
from auglocal_ext.nn.remade import _sources, source_of

NORMS = {
    "layer": lambda: nn.LayerNorm(WIDTH),
    "layer, no bias": lambda: nn.LayerNorm(WIDTH, bias=False),
    "layer, plain": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
    "rms": lambda: nn.RMSNorm(WIDTH, eps=1e-5),
    "rms, eps of the dtype": lambda: nn.RMSNorm(WIDTH),
    "rms, plain": lambda: nn.RMSNorm(WIDTH, elementwise_affine=False),
}
BETWEEN = {
    "nothing": lambda: [],
    "gelu": lambda: [nn.GELU()],
    "tanh gelu": lambda: [nn.GELU("tanh")],
    "dropout": lambda: [nn.Dropout(0.3)],
    "no dropout": lambda: [nn.Dropout(0.0)],
    "dropout twice": lambda: [nn.Dropout(0.3), nn.Dropout(0.5)],
    "gelu, dropout": lambda: [nn.GELU(), nn.Dropout(0.3)],
    "another layer": lambda: [nn.Tanh()],
}


@pytest.mark.parametrize("norm", NORMS)
def test_norms(norm):
    ours, theirs = pair(lambda: Reads(NORMS[norm]()))
    assert_same(ours, theirs, tokens())
    # mean and rstd, one number each in a row; eagerly the normalised rows too
    assert widths(ours, tokens()) - 3 <= 2 / WIDTH < widths(theirs, tokens()) - 3
    assert_same(ours, theirs, tokens().transpose(0, 1))  # not contiguous
    assert_same(ours, theirs, tokens()[0])
    assert_same(ours, theirs, tokens()[0, 0])


@pytest.mark.parametrize("between", BETWEEN)
def test_what_stands_between(between):
    ours, theirs = pair(lambda: Reads(nn.LayerNorm(WIDTH), BETWEEN[between]()))
    assert_same(ours, theirs, tokens())
    ours.eval(), theirs.eval()
    assert_same(ours, theirs, tokens())


@pytest.mark.parametrize("chain", ["gelu", "gelu, dropout", "dropout twice"])
def test_nothing_is_kept_of_activations_and_masks(chain):
    ours, theirs = pair(lambda: Reads(nn.LayerNorm(WIDTH), BETWEEN[chain](), readers=1))
    # the sine's input; what a norm's output is turned into is made again from that output, or from the norm's input
    assert widths(ours, tokens()) == pytest.approx(1 + ("gelu" in chain) + 2 / WIDTH)
    assert widths(theirs, tokens()) > widths(ours, tokens()) + 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_low_precision(dtype, autocast):
    ours, theirs = pair(lambda: Reads(nn.LayerNorm(WIDTH), [nn.GELU(), nn.Dropout(0.3)]), dtype)
    tolerance = 1e-5 if dtype == torch.float32 and not autocast else 3e-2
    assert_same(ours, theirs, tokens(dtype), tolerance, autocast=autocast)
    # autocast's copies of the weights are not kept either
    if autocast:
        ours.float(), theirs.float()
        assert_same(ours, theirs, tokens(dtype), 3e-2, autocast=True)


def test_each_parameter_alone():
    ours, theirs = pair(lambda: Reads(nn.LayerNorm(WIDTH), [nn.GELU()]))
    names = [name for name, _ in ours.named_parameters()]
    for name in names:
        for module in (ours, theirs):
            for other, parameter in module.named_parameters():
                parameter.requires_grad_(other == name)
        assert_same(ours, theirs, tokens())
    for module in (ours, theirs):
        module.requires_grad_(False)
    assert_same(ours, theirs, tokens())


def test_gate():
    gate, up = tokens().requires_grad_(), tokens(shape=(2, 5, WIDTH)).flip(0).requires_grad_()
    expected = F.silu(gate) * up
    grad = torch.randn_like(expected)
    wanted = [expected, *torch.autograd.grad(expected, (gate, up), grad)]
    apart = gated(gate, up)
    torch.testing.assert_close([apart, *torch.autograd.grad(apart, (gate, up), grad)], wanted)
    both = torch.cat((gate, up), -1).detach().requires_grad_()
    halves = gated(both)
    torch.testing.assert_close(halves, expected)
    torch.testing.assert_close(torch.autograd.grad(halves, both, grad)[0], torch.cat(wanted[1:], -1))
    only = gated(gate, up.detach())
    torch.testing.assert_close(torch.autograd.grad(only, gate, grad)[0], wanted[1])


def test_the_input_is_made_again_once_for_all_that_read_it(monkeypatch):
    ours, theirs = pair(lambda: Reads(nn.LayerNorm(WIDTH)))
    made = []
    again = lean_norm._again

    def counted(*args, **options):
        y = again(*args, **options)
        made.append(weakref.ref(y.untyped_storage()))
        return y

    monkeypatch.setattr(lean_norm, "_again", counted)
    x = tokens().requires_grad_()
    out = ours(x)
    out.sum().backward(retain_graph=True)
    assert len(made) == 1 and made[0]() is None  # and it is released in that backward pass
    found = torch.autograd.grad(out.sum(), [r.weight for r in ours.readers], retain_graph=True)
    assert len(made) == 2 and made[1]() is None
    expected = torch.autograd.grad(theirs(x).sum(), [r.weight for r in theirs.readers])
    torch.testing.assert_close(found, expected)
    torch.autograd.grad(out.sum(), [ours.readers[0].weight], retain_graph=True)  # one alone
    found = torch.autograd.grad(out.sum(), [x, *(r.weight for r in ours.readers)])
    torch.testing.assert_close(found[1:], expected)
    assert all(ref() is None for ref in made)


def test_a_tensor_at_the_place_of_one_that_is_gone_has_no_source():
    ours, _ = pair(lambda: Reads(nn.LayerNorm(WIDTH)))
    x, noted = tokens().requires_grad_(), set()
    for _ in range(200):
        y = ours.norm(x)
        noted.add(id(y))
        again = weakref.ref(y)
        node = y.sum().grad_fn  # which keeps the tensor, but not for Python
        assert source_of(y) is not None
        del y, node
        assert again() is None
        others = [torch.empty(1) for _ in range(3)]
        assert all(source_of(other) is None for other in others)
    assert len(noted) < 200  # places were taken again
    assert not noted & _sources.keys()


def test_an_output_that_outlives_its_backward_keeps_nothing_alive():
    ours, _ = pair(lambda: Reads(nn.LayerNorm(WIDTH)))
    h = tokens().requires_grad_() * 1
    y = ours.norm(h)
    assert source_of(y) is not None
    alive = weakref.ref(h.untyped_storage())
    ours.readers[0](y).sum().backward()
    del h
    assert source_of(y) is None and alive() is None
    stored = io.BytesIO()
    torch.save(y, stored)
    stored.seek(0)
    torch.testing.assert_close(torch.load(stored), y)


def doubled(module, args, out):
    return out * 2


def doubled_in_place(module, args, out):
    out.mul_(2)


@pytest.mark.parametrize("change", ["in place", "view", "hook", "hook that writes", "no grad"])
def test_changed_between(change):
    def call(module, x):
        if "hook" in change:
            hook = module.norm.register_forward_hook(doubled if change == "hook" else doubled_in_place)
        y = module.norm(x)
        if "hook" in change:
            hook.remove()
        elif change == "in place":
            y += 1
        elif change == "view":
            y = y.view(-1, WIDTH)[1:]
        else:
            with torch.no_grad():
                y.mul_(3)
        return sum(reader(y).sin() for reader in module.readers)

    ours, theirs = pair(lambda: Reads(nn.LayerNorm(WIDTH)))
    assert_same(ours, theirs, tokens(), call=call)


def test_an_input_that_was_written_to_is_refused_as_by_torch():
    for module in pair(lambda: Reads(nn.LayerNorm(WIDTH))):
        h = tokens().requires_grad_() * 1
        y = module.norm(h)
        h.add_(1)
        out = module.readers[0](y)
        if module.norm.__class__ is FusedLayerNorm:
            assert source_of(y) is None
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    ours, _ = pair(lambda: Reads(nn.LayerNorm(WIDTH)))
    out = ours(tokens())
    with torch.no_grad():
        ours.norm.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), ours.readers[0].weight)


def test_hooks_see_what_eager_ones_see():
    ours, theirs = pair(lambda: Reads(nn.LayerNorm(WIDTH), [nn.GELU(), nn.Dropout(0.3)]))
    seen = {}
    for module in (ours, theirs):
        for name, part in module.named_modules():
            add = seen.setdefault((module is ours, name), []).append
            part.register_forward_hook(lambda module, args, out, add=add: add(out.detach().clone()))
            part.register_full_backward_hook(lambda module, before, after, add=add: add(after[0].clone()))
    assert_same(ours, theirs, tokens())
    for (mine, name), values in seen.items():
        if mine:
            torch.testing.assert_close(values, seen[False, name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_masks_are_those_of_torch_and_the_random_state_goes_on(dtype):
    for shape in ((3, 4, WIDTH), (5, 7)):
        x = tokens(dtype, shape).requires_grad_()
        plain, ours = nn.Dropout(0.4), nn.Sequential(nn.GELU(), nn.Dropout(0.4))
        fuse(ours)
        torch.manual_seed(5)
        expected, then = plain(F.gelu(x)), torch.rand(3)
        torch.manual_seed(5)
        found, also = ours(x), torch.rand(3)
        assert torch.equal(found, expected) and torch.equal(then, also)
        state = torch.get_rng_state()
        torch.testing.assert_close(source_of(found).remake(source_of(found).tensors), expected, atol=0, rtol=0)
        grad = torch.randn(shape[::-1], dtype=dtype).permute(*range(len(shape))[::-1])  # strided as a gradient may be
        torch.set_rng_state(state)
        (found,) = torch.autograd.grad(found, x, grad, retain_graph=True)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(found, torch.autograd.grad(expected, x, grad)[0])


def test_what_another_thread_draws_meanwhile_changes_no_mask(monkeypatch):
    read = lean_dropout._random_state

    def read_before_another_draws(x):
        state = read(x)
        torch.rand(5)
        return state

    monkeypatch.setattr(lean_dropout, "_random_state", read_before_another_draws)
    dropout, x = nn.Sequential(nn.GELU(), nn.Dropout(0.5)), torch.ones(4, 64, requires_grad=True)
    fuse(dropout)
    y = dropout(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(grad != 0, y != 0)


def test_masks_are_kept_while_a_graph_is_captured(monkeypatch):
    ours, theirs = pair(
        lambda: Reads(nn.LayerNorm(WIDTH), [nn.GELU(), nn.Dropout(0.3), nn.Dropout(0.5)]), torch.float32
    )
    free = widths(ours, tokens(torch.float32))
    monkeypatch.setattr(lean_dropout, "_capturing", lambda x: True)
    monkeypatch.setattr(torch, "get_rng_state", None)
    with monkeypatch.context() as patch:
        patch.setattr(torch.random, "get_rng_state", None)
        assert_same(ours, theirs, tokens(torch.float32), 1e-4)
    # two masks, a byte an element
    assert widths(ours, tokens(torch.float32)) == pytest.approx(free + 2 * 1 / 4)


@pytest.mark.parametrize("how", ["checkpoint", "reentrant", "recomputed", "inside"])
def test_checkpoints(how):
    def call(module, x):
        if how == "checkpoint":
            return checkpoint(module, x, use_reentrant=False)
        if how == "reentrant":
            return checkpoint(module, x, use_reentrant=True)
        if how == "recomputed":
            return recomputed(module, x)
        y = checkpoint(lambda x: module.between(module.norm(x)), x, use_reentrant=False)
        return checkpoint(module.readers[0], y, use_reentrant=False).sin()

    ours, theirs = pair(lambda: Reads(nn.LayerNorm(WIDTH), [nn.GELU(), nn.Dropout(0.3)], readers=1))
    assert_same(ours, theirs, tokens(), call=call)
    if how in ("checkpoint", "recomputed"):
        assert widths(ours, tokens(), call) < 0.01


def test_saved_tensors_may_be_kept_elsewhere():
    def call(module, x):
        with torch.autograd.graph.save_on_cpu():
            return module(x)

    ours, theirs = pair(lambda: Reads(nn.LayerNorm(WIDTH), [nn.GELU(), nn.Dropout(0.3)]))
    assert_same(ours, theirs, tokens(), call=call)


@pytest.mark.parametrize("between", ["nothing", "gelu", "dropout"])
def test_second_derivatives_are_refused(between):
    ours, _ = pair(lambda: Reads(nn.LayerNorm(WIDTH), BETWEEN[between]()))
    x = tokens().requires_grad_()
    with pytest.raises(RuntimeError, match=r"differentiable once.*unfuse"):
        torch.autograd.grad(ours(x).sum(), x, create_graph=True)
    unfuse(ours)
    torch.autograd.grad(ours(x).sum(), x, create_graph=True)


def test_tracers_see_the_eager_layers():
    ours, theirs = pair(lambda: Reads(nn.LayerNorm(WIDTH), [nn.GELU(), nn.Dropout(0.0)]))
    x = tokens()
    expected = theirs(x)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_same(ours, theirs, x, call=lambda module, x: compiled(x) if module is ours else module(x))
    torch.testing.assert_close(torch.export.export(ours, (x,)).module()(x), expected)
    torch.testing.assert_close(torch.func.vmap(ours)(x), expected)
    values = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(module, values):
        return torch.func.functional_call(module, values, (x,)).square().sum()

    torch.testing.assert_close(
        torch.func.grad(lambda v: loss(ours, v))(values), torch.func.grad(lambda v: loss(theirs, v))(values)
    )
    assert ours(x[:0]).shape == expected[:0].shape


def test_copies_pickles_and_the_way_back():
    ours, theirs = pair(lambda: Reads(nn.LayerNorm(WIDTH), [nn.GELU(), nn.Dropout(0.1)]))
    kinds = [type(part) for part in theirs.modules()]
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert [type(part) for part in again.modules()] == [type(part) for part in ours.modules()]
        assert_same(again, theirs, tokens())
    assert fuse(ours).fused  # twice is once
    unfuse(ours)
    assert [type(part) for part in ours.modules()] == kinds
    assert type(ours.norm) is nn.LayerNorm


def test_arguments_may_be_named_as_before():
    for fused, eager in EAGER.items():
        assert list(inspect.signature(fused.forward).parameters) == list(inspect.signature(eager.forward).parameters)


def test_a_bias_without_weight_is_torchs():
    ours, theirs = pair(lambda: Reads(nn.LayerNorm(WIDTH)))
    for module in (ours, theirs):
        module.norm.weight = None
    assert_same(ours, theirs, tokens())


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_left_is_reported_and_right():
    class Own(nn.LayerNorm):
        pass

    net = nn.Sequential(nn.LayerNorm(WIDTH), Scaled(WIDTH, WIDTH), Own(WIDTH), nn.LayerNorm((5, WIDTH)), nn.GELU())
    net.append(nn.Linear(WIDTH, WIDTH))
    net[4].forward = torch.tanh
    net.double()
    theirs = copy.deepcopy(net)
    report = fuse(net)
    assert report.fused == ("0 (LayerNorm)", "5 (Linear)")
    assert dict(report.left) == {
        "2": "is of type Own, not nn.LayerNorm or nn.RMSNorm",
        "3": "normalises over 2 axes",
        "4": "has a forward of its own",
    }
    assert_same(net, theirs, tokens())


def test_networks_without_such_layers_are_left_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(16, 2))
    fuse(net)
    assert type(net[4]) is nn.Dropout and type(net[5]) is nn.Linear


def test_parametrized_and_other_weights_are_honoured():
    ours, theirs = pair(lambda: Reads(nn.LayerNorm(WIDTH)))
    for module in (ours, theirs):
        parametrizations.weight_norm(module.readers[0])
        parametrize.register_parametrization(module.norm, "weight", nn.Softplus())
        prune.l1_unstructured(module.readers[1], "weight", 0.5)
    assert_same(ours, theirs, tokens())
    assert isinstance(ours.readers[1], FusedLinear)

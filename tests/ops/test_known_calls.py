"""Calls like one before are not checked again, and any other call is."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from auglocal_ext import native, ops
from auglocal_ext.ops import providers, registry, tuning

module = import_module("auglocal_ext.ops.layer_norm")  # the package has a function of this name

needs_library = pytest.mark.skipif(isinstance(native.nodes(), str), reason=str(native.nodes()))


@pytest.fixture
def checked(monkeypatch):
    """Counts the calls that are checked; none is known yet."""
    calls, check = [], module.check_tensors
    monkeypatch.setattr(module, "check_tensors", lambda *call: calls.append(call) or check(*call))
    tuning.forget_lookups()
    return calls


def leaves(*shape, dtype=torch.float32):
    x, residual = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    weight, bias = (torch.randn(shape[-1]).to(dtype).requires_grad_() for _ in range(2))
    return x, residual, weight, bias


def step(x, residual, weight, bias, **options):
    y, total = ops.layer_norm(x, weight, bias, residual=residual, **options)
    return y, total, *torch.autograd.grad((y * total).sum(), (x, residual, weight, bias))


@needs_library
def test_a_known_call_is_not_checked_and_computes_the_same(checked):
    first = leaves(3, 5, 8)
    expected = step(*first)
    assert len(checked) == 1
    found = step(*first)
    assert all(map(torch.equal, expected, found)) and found[0].grad_fn.name() == expected[0].grad_fn.name()
    others = leaves(3, 5, 8)
    step(*others)
    step(*(each.detach().clone().requires_grad_() for each in first))
    ops.layer_norm(others[0].detach(), *others[2:], residual=torch.nn.Parameter(others[1]))
    assert len(checked) == 1


@needs_library
@pytest.mark.parametrize(
    "change",
    [
        lambda x, r, w, b: (x.double(), r.double(), w, b),
        lambda x, r, w, b: (x, r, w.double(), b),
        lambda x, r, w, b: (x, r, w, None),
        lambda x, r, w, b: (x, r, None, None),
        lambda x, r, w, b: (x, None, w, b),
        lambda x, r, w, b: (x[:, :3], r[:, :3], w, b),
        lambda x, r, w, b: (x.transpose(0, 1).contiguous().transpose(0, 1), r, w, b),
        lambda x, r, w, b: (x.flatten(0, 1), r.flatten(0, 1), w, b),
        lambda x, r, w, b: tuple(each.to("meta") for each in (x, r, w, b)),
        lambda x, r, w, b: (x, r, w, b, {"eps": 1e-6}),
        lambda x, r, w, b: (x, r, w, None, {"rms": True}),
        lambda x, r, w, b: (x, r, w, b, {"provider": "reference"}),
    ],
)
def test_another_form_is_checked(checked, change):
    def run(x, residual, weight, bias, options=None):
        return ops.layer_norm(x, weight, bias, residual=residual, **(options or {}))

    x, residual, weight, bias = leaves(3, 5, 8)
    run(x, residual, weight, bias)
    other = change(x, residual, weight, bias)
    for number in (2, 2):
        run(*other)
        assert len(checked) == number
    run(x, residual, weight, bias)
    assert len(checked) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, r, w, b: (x, r[:1], w, b), "expected residual"),
        (lambda x, r, w, b: (x, r.double(), w, b), "expected residual"),
        (lambda x, r, w, b: (x, r, w[:7], b), "expected weight of shape"),
        (lambda x, r, w, b: (x, r, w, b.to("meta")), "expected bias on cpu"),
        (lambda x, r, w, b: (x[:0], r[:0], w, b), "with elements"),
        (lambda x, r, w, b: (x.detach().to_sparse(), r, w, b), "dense tensor, got one of layout torch.sparse_coo"),
        (lambda x, r, w, b: (torch.nested.nested_tensor([x[0]]), r, w, b), "dense tensor, got a nested one"),
        (lambda x, r, w, b: (x, r, w, b, {"eps": 10**400}), "positive eps"),
        (lambda x, r, w, b: (x, r, w, b, {"eps": 0.0}), "positive eps"),
        (lambda x, r, w, b: (x, r, w, b, {"eps": 1e-320}), "positive eps"),
        (lambda x, r, w, b: (x, r, w, b, {"rms": 0}), "rms"),
        (lambda x, r, w, b: (x, r, w, b, {"provider": "none"}), "no provider 'none'"),
    ],
)
def test_what_is_refused_is_refused_after_a_known_call(change, message):
    def run(x, residual, weight, bias, options=None):
        return ops.layer_norm(x, weight, bias, residual=residual, **(options or {}))

    call = leaves(3, 5, 8)
    for _ in range(2):
        run(*call)
        with pytest.raises((TypeError, ValueError), match=message):
            run(*change(*call))


@needs_library
def test_the_environment_and_a_decision_make_calls_new(checked, monkeypatch):
    call = leaves(2, 8)
    step(*call)
    monkeypatch.setenv(providers.ENVIRONMENT, "reference")
    step(*call)
    step(*call)
    assert len(checked) == 2
    monkeypatch.setenv(providers.ENVIRONMENT, "none")
    with pytest.raises(ValueError, match="AUGLOCAL_PROVIDER='none'"):
        step(*call)
    monkeypatch.delenv(providers.ENVIRONMENT)
    step(*call)
    assert len(checked) == 3
    tuning.adopt({"a form": "cpu"})
    step(*call)
    step(*call)
    assert len(checked) == 4


def test_what_transforms_and_tracers_do_with_a_known_call():
    x, _, weight, bias = (each.detach() for each in leaves(3, 5, 8))

    def run(x):
        return ops.layer_norm(x, weight, bias, provider="reference")

    plain, _ = run(x), run(x)
    with pytest.raises(NotImplementedError, match="torch.func"):
        torch.func.vmap(run)(x)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        run(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    assert torch.equal(torch.compile(run, backend="aot_eager")(x), plain)
    traced, other = torch.jit.trace(run, x, check_trace=False), torch.randn_like(x)
    assert torch.equal(traced(other), run(other))


@needs_library
def test_many_forms_are_forgotten_rather_than_kept(checked):
    number = registry.recorder(registry.overload("layer_norm", "reference")).number(*leaves(2, 8), 1e-5, False)
    for size in range(5000):
        native.nodes().remember(number, ["layer_norm", None, None, -1, size])
    step(*leaves(2, 8))
    step(*leaves(2, 8))
    assert len(checked) == 1
    assert native.nodes().again("layer_norm", None, None, -1, 0) is None

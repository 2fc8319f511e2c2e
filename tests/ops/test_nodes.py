"""The autograd nodes in C++ do what those in Python do, and what torch asks of a node; reasons for not having them."""

from __future__ import annotations

import gc
import itertools
import re
import sysconfig
import threading
import weakref
from pathlib import Path

import pytest
import torch

from auglocal_ext import native, ops
from auglocal_ext.ops import nodes, providers, registry

SHAPE = (3, 4, 5, 6)
CHANNELS, POOL = (4,), (2, 2, 2, 2, 0, 0)

needs_library = pytest.mark.skipif(isinstance(native.nodes(), str), reason=str(native.nodes()))


def _random(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def inputs_of(case, dtype):
    """Name and inputs of a call, and the places of those that are differentiable."""
    name, slope = case
    x, vector = _random(*SHAPE, dtype=dtype), [_random(*CHANNELS) for _ in range(4)]
    weight, bias, mean, var = vector[0], vector[1], vector[2], vector[3].exp()
    rows = [_random(2, 3, 8, dtype=dtype), _random(2, 3, 8, dtype=dtype).flip(1), _random(8, dtype=dtype), _random(8)]
    counter, residual = torch.tensor(3), x.flip(0)
    matrix, labels, made = _random(5, 4, dtype=dtype), torch.tensor([1, 4, -100]), (True, True, True)
    return {
        "batch_norm_act": ([x, mean, var, weight, bias, residual, slope, False], (0, 3, 4, 5)),
        "batch_norm_act_forward_": (
            [x, mean, var, counter, weight, bias, residual, 0.1, 1e-5, slope],
            (0, 4, 5, 6),
        ),
        "batch_norm_act_max_pool": ([x, mean, var, weight, bias, slope, *POOL, True], (0, 3, 4)),
        "batch_norm_act_max_pool_forward_": (
            [x, mean, var, counter, weight, bias, 0.1, 1e-5, slope, *POOL],
            (0, 4, 5),
        ),
        "layer_norm": ([*rows, 1e-5, False], (0, 1, 2, 3)),
        "layer_norm alone": ([rows[0], None, *rows[2:], 1e-5, False], (0, 2, 3)),
        "layer_norm rms": ([*rows[:3], None, 1e-5, True], (0, 1, 2)),
        "linear_cross_entropy": (
            [x[:, :, 0, 0], matrix, matrix[:, 0].clone(), labels, -100, 0.1, 1e-3, torch.float32, *made],
            (0, 1, 2),
        ),
        "linear_cross_entropy_small": (
            [x[:, :, 0, 0], matrix, None, labels, -100, 0.0, 0.0, torch.float32, *made],
            (0, 1),
        ),
        "pooled_cross_entropy": ([x, matrix, matrix[:, 0].clone(), labels, -100, 0.1, True, *made], (0, 1, 2)),
        "pooled_cross_entropy alone": ([x, matrix, None, labels, -100, 0.0, False, *made], (0, 1)),
        "supervised_contrast": ([x[:, :, 0, 0], torch.tensor([1, 1, 2]), 0.1, -100, True], (0,)),
    }[name]


CASES = [
    *itertools.product(
        [
            "batch_norm_act",
            "batch_norm_act_forward_",
            "batch_norm_act_max_pool",
            "batch_norm_act_max_pool_forward_",
        ],
        (0.0, 1.0),
    ),
    ("layer_norm", None),
    ("layer_norm alone", None),
    ("layer_norm rms", None),
    ("linear_cross_entropy", None),
    ("linear_cross_entropy_small", None),
    ("pooled_cross_entropy", None),
    ("pooled_cross_entropy alone", None),
    ("supervised_contrast", None),
]


def recorder(case, provider):
    return registry.recorder(registry.overload(case[0].split()[0], provider))


def outcome(run, case, dtype, needed):
    """Results, which of them need gradients, gradients, saved bytes, and what was written to."""
    inputs, differentiable = inputs_of(case, dtype)
    inputs = [each.clone() if isinstance(each, torch.Tensor) else each for each in inputs]
    for place, need in zip(differentiable, needed, strict=False):
        inputs[place].requires_grad_(need)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
        made = run(*inputs)
    made = made if isinstance(made, tuple) else (made,)
    outputs = [each for each in made if each.requires_grad]
    if outputs:
        torch.autograd.backward(outputs, [_random(*each.shape, dtype=each.dtype) for each in outputs])
    gradients = [each.grad if isinstance(each, torch.Tensor) else None for each in inputs]
    return [*made, *gradients, *inputs], [each.requires_grad for each in made], sorted(saved)


@needs_library
@pytest.mark.parametrize("provider", ["cpu", "aten", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_are_those_in_python(case, dtype, provider):
    if not providers.available(provider):
        pytest.skip("not built")
    if case[0].endswith("_small") and provider != "cpu":
        pytest.skip("a kernel of the CPU alone")
    run, count = recorder(case, provider), len(inputs_of(case, dtype)[1])
    alone = [tuple(i == j for j in range(count)) for i in range(count)]
    for needed in [(True,) * count, (False,) * count, *alone]:
        mine, grad, saved = outcome(run, case, dtype, needed)
        theirs, expected_grad, expected_saved = outcome(run.in_python, case, dtype, needed)
        assert grad == expected_grad and (saved == expected_saved or not any(grad))
        for a, b in zip(mine, theirs, strict=True):
            if isinstance(b, torch.Tensor):
                assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)
            else:
                assert a is b or a == b


def test_of_the_library_runs_where_there_is_one(monkeypatch):
    x = torch.randn(2, 4, requires_grad=True)
    name = ops.layer_norm(x).grad_fn.name()
    assert ("Recorded" in name) and (("CppNode" in name) is not isinstance(native.nodes(), str))


def both(case=("layer_norm", None)):
    run = recorder(case, "reference")
    return [run, run.in_python]


def leaves():
    return [torch.randn(2, 3, 8, requires_grad=True) for _ in range(2)] + [torch.ones(8, requires_grad=True)] * 2


@pytest.mark.parametrize("run", both())
def test_the_sum_alone_leaves_the_vectors_without_gradients(run):
    x, residual, weight, bias = leaves()
    _, total = run(x, residual, weight, bias, 1e-5, False)
    grad = torch.randn_like(total)
    total.backward(grad)
    assert torch.equal(x.grad, grad) and torch.equal(residual.grad, grad) and weight.grad is None


@pytest.mark.parametrize("run", both())
def test_refuse_what_they_cannot_do(run):
    x, residual, weight, bias = leaves()
    y, total = run(x, residual, weight, bias, 1e-5, False)
    with pytest.raises(RuntimeError, match="layer_norm is differentiable once.*use F.layer_norm"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.autograd.grad(y.sum(), x)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), x)
    y, total = run(x, residual, weight, bias, 1e-5, False)
    total.data += 0  # which autograd does not see
    total.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("run", both(("linear_cross_entropy", None)))
def test_losses_refuse_a_gradient_that_the_forward_pass_did_not_make(run):
    inputs, places = inputs_of(("linear_cross_entropy", None), torch.float32)
    inputs[-2] = False
    for place in places:
        inputs[place].requires_grad_()
    loss, correct, nll = run(*inputs)
    assert not correct.requires_grad and not nll.requires_grad
    with pytest.raises(RuntimeError, match="gradient of input 1 was not made; set the need_"):
        loss.backward()


@pytest.mark.parametrize("run", both())
def test_may_run_again_and_under_a_debugger(run):
    x, residual, weight, bias = leaves()
    with torch.autograd.detect_anomaly(check_nan=True):
        y, _ = run(x, residual, weight, bias, 1e-5, False)
        first = torch.autograd.grad(y.square().sum(), (x, weight), retain_graph=True)
    second = torch.autograd.grad(y.square().sum(), (x, weight))
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("run", both())
def test_let_go_of_what_they_saved(run):
    x = torch.randn(2, 3, 8)
    kept = weakref.ref(x)
    y = run(x, None, torch.ones(8, requires_grad=True), None, 1e-5, False)
    del x
    gc.collect()
    assert kept() is not None
    y.sum().backward()
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("run", both())
def test_threads_at_once(run):
    found, inputs = [], leaves()

    def step():
        for _ in range(20):
            y, _ = run(*inputs, 1e-5, False)
            found.append(torch.autograd.grad(y.square().sum(), inputs[0])[0])

    threads = [threading.Thread(target=step) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 80 and all(torch.equal(each, found[0]) for each in found)


class Own(torch.Tensor):
    """A class of its own, whose operators are torch's."""


def test_other_classes_and_tracers_have_the_node_in_python():
    x = torch.randn(2, 8).as_subclass(Own).requires_grad_()
    y = ops.layer_norm(x, provider="reference")
    assert isinstance(y, Own) and "CppNode" not in y.grad_fn.name()
    traced = torch.jit.trace(lambda x: ops.layer_norm(x, provider="reference"), torch.randn(2, 8), check_trace=False)
    x = torch.randn(2, 8)
    assert torch.equal(traced(x), ops.layer_norm(x, provider="reference"))


@pytest.mark.parametrize("run", both())
def test_errors_of_kernels_are_theirs(run):
    with pytest.raises(Exception) as raised:
        run(torch.randn(2, 8, requires_grad=True), torch.randn(2, 7), None, None, 1e-5, False)
    assert "Exception raised from" not in str(raised.value) and "match the size" in str(raised.value)


def test_numbers_are_those_of_the_library():
    source = (Path(__file__).parents[2] / "csrc/nodes/nodes.cpp").read_text()
    listed = ", ".join(f"k{each.name.capitalize()}" for each in nodes.From)
    assert f"enum class From : int64_t {{ {listed} }};" in source and [*nodes.From] == list(range(5))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"built": False, "reason": "no compiler"}, "not built: no compiler"),
        ({"torch": "1.0"}, "built for torch 1.0, and this is .*no-build-isolation"),
        ({"python": "cpython-30"}, "built for python cpython-30, and this is"),
        ({}, "built, but it cannot be imported"),
    ],
)
def test_reasons_for_python(change, reason, monkeypatch, tmp_path):
    own = {"built": True, "torch": torch.__version__, "python": sysconfig.get_config_var("SOABI"), "file": "none.so"}
    build = native.Build(tmp_path, {"libraries": {"nodes": own | change}})
    monkeypatch.setattr(native, "build", lambda: build)
    found = native.nodes.__wrapped__()
    assert isinstance(found, str) and re.match(reason, found)

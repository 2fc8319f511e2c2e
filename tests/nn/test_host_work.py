"""What fused layers cost the host: Python calls, time, kernels for counters and casts; and what is still looked at."""

from __future__ import annotations

import copy
import os
import sys
import time
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import auglocal_ext
from auglocal_ext import fuse, models, native, ops
from auglocal_ext.nn import BatchNormAct2d, recomputed
from auglocal_ext.ops import providers

LENGTH = 8


class Operators(TorchDispatchMode):
    """Counts operators by name, with the shape of their first argument."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shape = tuple(args[0].shape) if args and isinstance(args[0], torch.Tensor) else None
        self.found[func._schema.name.split("::")[1], shape] += 1
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def chain(length=LENGTH, channels=4, **options):
    torch.manual_seed(0)
    layers = [
        layer
        for _ in range(length)
        for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels, **options), nn.ReLU())
    ]
    return nn.Sequential(*layers)


def fused(net):
    fuse(net)
    return net


def image():
    return torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1))


def step(net, x):
    parameters = list(net.parameters())

    def run():
        out = net(x)
        torch.autograd.grad(out, parameters, out)

    return run


def python_calls(run):
    """Calls of functions of this package, since those inside torch differ from version to version."""
    calls, package = 0, os.path.dirname(auglocal_ext.__file__)

    def count(frame, event, argument):
        nonlocal calls
        calls += event == "call" and frame.f_code.co_filename.startswith(package)

    run()
    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def test_python_calls_of_a_unit():
    """The difference of two lengths, so that what a step costs once does not count."""
    if not providers.available("cpu"):
        pytest.skip("passes of the reference are functions of this package too")
    short, long = (python_calls(step(fused(chain(length)), image())) for length in (2, 10))
    assert (long - short) / 8 <= 19


def _norm(x):
    return BatchNormAct2d(4), lambda layer: layer(x)


def _norm_op(x):
    return BatchNormAct2d(4), lambda layer: ops.batch_norm_act(
        x, layer.weight, layer.bias, layer.running_mean, layer.running_var, training=True
    )


def _pool_op(x):
    return BatchNormAct2d(4), lambda layer: ops.batch_norm_act_max_pool(
        x, layer.weight, layer.bias, layer.running_mean, layer.running_var, training=True
    )


def _layer_norm(x):
    return nn.LayerNorm(4), lambda layer: ops.layer_norm(x, layer.weight, layer.bias, residual=x)[0]


@pytest.mark.parametrize(("made", "most"), [(_norm, 15), (_norm_op, 11), (_pool_op, 13), (_layer_norm, 8)])
def test_python_calls_of_an_op_alone(made, most):
    if not providers.available("cpu"):
        pytest.skip("passes of the reference are functions of this package too")
    if isinstance(reason := native.nodes(), str):
        pytest.skip(f"nodes are functions of this package too: {reason}")
    x = image().requires_grad_()
    layer, run = made(x)

    def step():
        out = run(layer)
        torch.autograd.grad(out, [x, layer.weight, layer.bias], torch.ones_like(out))

    step()
    assert python_calls(step) <= most


@pytest.mark.parametrize(
    ("options", "most"), [({"norm": "layer", "mlp": "gelu", "positions": "learned"}, 127), ({}, 142)]
)
def test_python_calls_of_a_block_of_tokens(options, most):
    if not providers.available("cpu"):
        pytest.skip("passes of the reference are functions of this package too")
    ids, calls = torch.zeros(1, 4, dtype=torch.int64), []
    for layers in (2, 4):
        net = fused(models.gpt(layers=layers, width=8, heads=2, vocab_size=4, context=4, **options))
        calls.append(python_calls(step(net, ids)))
    assert (calls[1] - calls[0]) / 2 <= most


def test_a_unit_crosses_into_its_ops_three_times():
    """Each crossing costs the host microseconds: forward, the map made again, backward."""
    with Operators() as operators:
        step(fused(chain()), image())()
    ours = {name: count for name, count in operators.found.items() if str(name).startswith("auglocal_ext.")}
    assert {name.split(".")[1]: count for name, count in ours.items()} == {
        "batch_norm_act_forward_": LENGTH,
        "batch_norm_act_apply": LENGTH - 1,  # the last unit has no convolution, whose backward reads the map
        "batch_norm_act_backward": LENGTH,
    }


@pytest.mark.slow
def test_time_of_a_unit():
    """Process time beside torch's three modules, the least of many short runs."""
    if not providers.available("cpu"):
        pytest.skip("the reference takes many times as long")
    runs = {name: step(net, image()) for name, net in (("fused", fused(chain())), ("torch", chain()))}
    least = dict.fromkeys(runs, float("inf"))
    for _ in range(300):
        for name, run in runs.items():
            start = time.process_time()
            run()
            least[name] = min(least[name], time.process_time() - start)
    assert least["fused"] <= 1.5 * least["torch"]


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"track_running_stats": False}], ids=str)
def test_batches_are_counted_as_by_torch(options):
    theirs = chain(3, **options)
    ours = fused(copy.deepcopy(theirs))
    for training, frozen in ((True, None), (True, 4), (False, None), (True, 1)):
        for net in (ours, theirs):
            net.train(training)
            if frozen is not None:
                net[frozen].eval()
            net(image())
        for name, value in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value)
            assert ours.state_dict()[name].dtype == value.dtype


def test_batches_are_counted_once_where_layers_run_again():
    ours = fused(chain(3))
    recomputed(ours, image().requires_grad_()).sum().backward()
    assert [int(ours[index].num_batches_tracked) for index in (1, 4, 7)] == [1, 1, 1]


def test_batches_of_a_layer_that_runs_twice_and_of_one_that_is_not_reached():
    theirs = chain(3)
    theirs[4] = theirs[1]
    theirs[6] = nn.Conv2d(5, 4, 1)  # which no input fits
    ours = fused(copy.deepcopy(theirs))
    for net in (ours, theirs):
        with pytest.raises(RuntimeError):
            net(image())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
    assert (int(ours[1].num_batches_tracked), int(ours[7].num_batches_tracked)) == (2, 0)


def test_counting_batches_launches_nothing():
    net = fused(models.BasicBlock(4, 4))
    with Operators() as operators:
        net(image())
    assert operators.found["batch_norm_act_forward_", (2, 4, 4, 4)] == 2
    assert not any(name[0] == "add_" for name in operators.found if isinstance(name, tuple))
    assert int(net.bn1.num_batches_tracked) == int(net.bn2.num_batches_tracked) == 1


def test_a_weight_is_cast_once():
    net = fused(chain(2))
    with Operators() as operators:
        with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
            out = net(image())
        torch.autograd.grad(out.float().sum(), net[3].weight)
    assert operators.found["_to_copy", (4, 4, 3, 3)] == 3  # both weights forward, and the second's gradient back


def test_the_provider_is_looked_up_at_every_call(monkeypatch):
    net = fused(chain(2))
    monkeypatch.delenv(providers.ENVIRONMENT, raising=False)
    automatic = providers.choose("batch_norm_act", "cpu", torch.float32)
    found = []
    for name in ("reference", None, "reference"):
        if name is None:
            monkeypatch.delenv(providers.ENVIRONMENT)
        else:
            monkeypatch.setenv(providers.ENVIRONMENT, name)
        with Operators() as operators:
            net(image())
        found.append(operators.found["auglocal_ext.batch_norm_act_forward_.reference"])
    assert found == [2, 2 if automatic == "reference" else 0, 2]
    monkeypatch.setenv(providers.ENVIRONMENT, "fastest")
    with pytest.raises(ValueError, match="fastest"):
        net(image())


def test_what_a_call_finds_counts():
    """Whatever is put in later, the next call runs it."""
    seen = []
    changes = {
        "hook": lambda net: net[4].register_forward_hook(lambda *_: seen.append("hook")),
        "forward": lambda net: setattr(net[5], "forward", lambda x: seen.append("forward") or torch.relu(x)),
        "class": lambda net: net.__setitem__(1, nn.GroupNorm(2, 4)),
        "padding mode": lambda net: setattr(net[3], "padding_mode", "reflect"),
        "stride": lambda net: setattr(net[6], "stride", (2, 2)),
        "slope": lambda net: net.__setitem__(2, nn.LeakyReLU(0.3)),
        "weight": lambda net: setattr(net[3], "weight", nn.Parameter(torch.ones(4, 4, 3, 3))),
        "eps": lambda net: setattr(net[7], "eps", 0.5),
        "mode": lambda net: net[4].eval(),
        "plain attribute": lambda net: (net[4].__delattr__("weight"), setattr(net[4], "weight", torch.full((4,), 2.0))),
    }
    ours = fused(chain(3))
    for change in changes.values():
        change(ours)
        theirs = nn.Sequential(*copy.deepcopy(list(ours)))
        expected = theirs(image())
        before = len(seen)
        torch.testing.assert_close(ours(image()), expected)
        torch.testing.assert_close(ours.state_dict(), theirs.state_dict())
        assert len(seen) - before == len(set(seen))


def test_vectors_that_do_not_fit_are_refused():
    net = fused(chain(2))
    net[1].running_mean = torch.zeros(5)
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        net(image())

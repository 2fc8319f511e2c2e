"""The meter's count of live storage, against counts made by hand."""

from __future__ import annotations

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from auglocal_ext.memory import MemoryMeter
from auglocal_ext.memory.meter import ACTIVATIONS, GRADIENTS, INPUTS, OPTIMIZER_STATE, PARAMETERS


@pytest.fixture(params=["real", "fake"])
def tensors(request):
    """The same test on real CPU tensors and on fake ones."""
    if request.param == "real":
        yield
    else:
        with FakeTensorMode():
            yield


@pytest.mark.parametrize(("elements", "nbytes"), [(0, 0), (1, 512), (128, 512), (129, 1024), (1000, 4096)])
def test_sizes_are_rounded_to_512_bytes(tensors, elements, nbytes):
    with MemoryMeter() as meter:
        x = torch.empty(elements)
        assert (meter.live_bytes, meter.peak_bytes) == (nbytes, nbytes)
        del x
        assert (meter.live_bytes, meter.peak_bytes) == (0, nbytes)


def test_a_storage_lives_until_its_last_view_dies(tensors):
    with MemoryMeter() as meter:
        x = torch.zeros(4, 128)
        row, flat, same = x[0], x.view(-1), x.detach()
        assert meter.live_bytes == 2048
        del x, flat, same
        assert meter.live_bytes == 2048
        del row
        assert meter.live_bytes == 0


def test_in_place_and_out_make_nothing_new(tensors):
    with MemoryMeter() as meter:
        x, out = torch.ones(256), torch.empty(256)
        x.add_(1).mul_(2)
        torch.mul(x, x, out=out)
        torch._foreach_add_([x, out], 1.0)
        assert meter.live_bytes == meter.peak_bytes == 2048


def test_every_output_of_an_operator_counts(tensors):
    with MemoryMeter() as meter:
        values, indices = torch.ones(2, 128).max(dim=1)  # fp32 and int64, 2 elements each
        made = torch._foreach_add([values, values], 1.0)
        assert meter.live_bytes == 2 * 512 + 2 * 512
        del indices, made
        assert meter.live_bytes == 512


def test_temporaries_raise_the_peak_only(tensors):
    x = torch.ones(1024)
    with MemoryMeter() as meter:
        y = (x + 1) * 2  # the sum lives until the product exists
        assert (meter.live_bytes, meter.peak_bytes) == (4096, 8192)
        assert y.shape == (1024,)


def test_resized_storages_are_followed(tensors):
    with MemoryMeter() as meter:
        x = torch.empty(128)
        x.resize_(1024)
        assert meter.live_bytes == 4096
        x.untyped_storage().resize_(0)
        meter.mark("emptied")
        assert (meter.live_bytes, meter.peak_bytes) == (0, 4096)


def test_tensors_from_before_count_once_tracked(tensors):
    x = torch.empty(1024)
    with MemoryMeter() as meter:
        assert meter.live_bytes == 0
        meter.track(x, {"view": x[1:]}, [x])
        assert meter.live_bytes == meter.peak_bytes == 4096
        assert meter.live_categories[INPUTS] == 4096
        del x
        assert meter.live_bytes == 0
    with pytest.raises(TypeError, match="expected modules, optimizers, tensors"):
        meter.track(3)
    with pytest.raises(ValueError, match="categories"):
        meter.track(torch.empty(1), category="weights")


def test_timeline_marks_and_live_list(tensors):
    with MemoryMeter() as meter:
        x = torch.zeros(128)
        meter.mark("second")
        y = torch.zeros(256)
        del x
        z = torch.zeros(128)
        largest = meter.live()[0]
    assert [live for _, live in meter.timeline] == [512, 1536, 1024, 1536]
    assert [(mark.event, mark.label) for mark in meter.marks] == [(1, "second")]
    assert (largest.nbytes, largest.category, largest.event) == (1024, ACTIVATIONS, 2)
    assert "aten.zeros" in largest.operator
    assert len(y) + len(z) == 384


def test_counting_goes_on_when_tensors_die_after_the_exit(tensors):
    with MemoryMeter() as meter:
        x = torch.zeros(128)
    assert meter.live_bytes == 512
    del x
    assert meter.live_bytes == 0


def two_layers():
    net = nn.Sequential(nn.Linear(256, 512, bias=False), nn.ReLU(), nn.Linear(512, 128, bias=False))
    return net, torch.ones(64, 256, requires_grad=False)


def test_peak_of_a_two_layer_network_worked_out_by_hand(tensors):
    net, x = two_layers()
    first, second = 4 * 256 * 512, 4 * 512 * 128  # weights
    image, hidden, output = 4 * 64 * 256, 4 * 64 * 512, 4 * 64 * 128
    fixed = first + second + image
    with MemoryMeter() as meter:
        meter.track(net, x)
        assert meter.live_bytes == fixed
        a = net[0](x)
        b = net[1](a)
        assert meter.live_bytes == fixed + 2 * hidden
        del a  # ReLU saves its output, not its input
        assert meter.live_bytes == fixed + hidden
        y = net[2](b)
        del b
        assert meter.live_bytes == fixed + hidden + output
        seed = torch.ones_like(y)
        y.backward(seed)
        # Last comes the first weight's gradient. By then the second weight's gradient exists, the gradient of
        # the ReLU's input is alive, the ReLU's output and its gradient are gone; y and the seed are ours.
        at_end = fixed + 2 * output + second + hidden + first
        # Before that: the ReLU's output (saved), the gradient of it and the gradient of its input.
        at_relu = fixed + 2 * output + second + 3 * hidden
        assert meter.peak_bytes == max(at_end, at_relu) == at_end
        assert meter.live_bytes == fixed + 2 * output + first + second
        meter.refresh()
        assert meter.live_categories[GRADIENTS] == first + second
        assert meter.peak_categories[GRADIENTS] == first + second
        assert meter.peak_categories[PARAMETERS] == first + second
        assert sum(meter.peak_categories.values()) == meter.peak_bytes


def test_gradients_accumulate_in_place(tensors):
    net, x = two_layers()
    with MemoryMeter() as meter:
        meter.track(net, x)
        before = meter.live_bytes
        net(x).sum().backward()
        gradients = meter.live_bytes - before
        net(x).sum().backward()
        assert meter.live_bytes - before == gradients == 4 * (256 * 512 + 512 * 128)
        net.zero_grad(set_to_none=True)
        assert meter.live_bytes == before


@pytest.mark.parametrize("foreach", [False, True])
def test_optimizer_state_appears_and_stays(tensors, foreach):
    net, x = two_layers()
    weights = 4 * (256 * 512 + 512 * 128)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=foreach)
    with MemoryMeter() as meter:
        meter.track(net, optimizer, x)
        net(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        meter.refresh()
        assert meter.live_categories[OPTIMIZER_STATE] == weights
        assert meter.live_bytes == 2 * weights + 4 * 64 * 256
    net(x).sum().backward()
    with MemoryMeter() as meter:
        meter.track(net, optimizer, x)
        before = meter.live_bytes
        optimizer.step()
        # weight decay makes decayed gradients: of all parameters at once, or of one at a time
        largest = weights if foreach else 4 * 256 * 512
        assert meter.peak_bytes - before == largest


def test_checkpointing_is_seen_to_recompute(tensors):
    block = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256, bias=False), nn.Tanh()) for _ in range(4)))
    x = torch.ones(64, 256, requires_grad=True)
    saved = {}
    for name, run in (
        ("plain", block),
        ("checkpointed", lambda v: checkpoint(block, v, use_reentrant=False)),
    ):
        with MemoryMeter() as meter:
            meter.track(block, x)
            before = meter.live_bytes
            out = run(x)
            saved[name] = meter.live_bytes - before
            out.sum().backward()
            saved[name + " peak"] = meter.peak_bytes - before
        del out
        block.zero_grad(set_to_none=True)
        x.grad = None
    activation = 4 * 64 * 256
    assert saved["plain"] == 4 * activation
    # its output, and at most the random state that checkpointing stashes
    assert activation <= saved["checkpointed"] < 2 * activation
    assert saved["checkpointed peak"] > 4 * activation


def test_custom_operators_and_autograd_functions_count(tensors):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x * 3)  # alive until the backward pass
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            (tripled,) = ctx.saved_tensors
            return grad * 2 + tripled * 0

    x = torch.ones(1024, requires_grad=True)
    with MemoryMeter() as meter:
        y = Double.apply(x)
        assert meter.live_bytes == 2 * 4096
        y.backward(torch.ones_like(y))
        assert meter.live_bytes == 2 * 4096  # y and the gradient of x
        assert x.grad is not None


def test_a_graph_is_gone_after_its_backward(tensors):
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    x = torch.ones(4, 3, 16, 16)
    y = torch.zeros(4, dtype=torch.int64)
    with MemoryMeter() as meter:
        meter.track(net, x, y)
        before = meter.live_bytes
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        kept = loss.detach()
        del loss
        meter.refresh()
        gc.collect()
        assert meter.live_bytes - before == meter.live_categories[GRADIENTS] + 512
        assert kept.shape == ()


def test_modes_of_a_nested_meter_agree(tensors):
    with MemoryMeter() as outer, MemoryMeter() as inner:
        x = torch.ones(128)
        y = x + 1
    assert outer.peak_bytes == inner.peak_bytes == 1024
    assert len(y) == 128

"""A LocalSequential in other dtypes and memory formats, under autocast and with a loss scaler."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
from test_local_sequential import batch, grads, small
from torch import nn

from auglocal_ext import AugLocal, ContSup, LocalSequential, models


def test_bfloat16_autocast():
    net = small(ContSup("R1E"))
    x, y = batch(16)
    net(x, y).loss.backward()
    exact = {name: grad.clone() for name, grad in grads(net).items()}
    net.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x, y)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    assert {grad.dtype for grad in grads(net).values()} == {torch.float32}
    found, expected = (torch.cat([g.flatten() for g in d.values()]) for d in (grads(net), exact))
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_autocast_keeps_no_weight_casts():
    net = small()
    casts = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
                casts.append(weakref.ref(out.untyped_storage()))
            return out

    x, y = batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with Watch():
            out = net(x, y)
        assert casts and not any(ref() is not None for ref in casts)
    out.loss.backward()


def mlp(scale=1.0):
    torch.manual_seed(5)
    layers = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    return LocalSequential(layers, ContSup("R0", "0c1f"), 4, (12,))


def test_float16_with_grad_scaler_keeps_small_gradients():
    x, y = torch.randn(64, 12) * 1e-5, torch.randint(0, 4, (64,))

    def run(scaler, dtype):
        net = mlp()
        with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
            out = net(x, y, grad_scaler=scaler)
        (out.loss if scaler is None else scaler.scale(out.loss)).backward()
        return net, net.primary[0].weight.grad

    _, exact = run(None, torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    net, scaled = run(scaler, torch.float16)
    torch.testing.assert_close(scaled / 2.0**14, exact, rtol=2e-2, atol=exact.abs().max().item() * 1e-2)
    with pytest.warns(UserWarning, match="without grad_scaler"):
        _, unscaled = run(None, torch.float16)
    # without the scale most of these gradients are zero, which is what the test is about
    assert ((unscaled == 0) & (exact != 0)).sum() > 20 * ((scaled == 0) & (exact != 0)).sum() + 10

    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scaler.unscale_(optimizer)
    torch.testing.assert_close(net.primary[0].weight.grad, scaled)  # unscaled in place
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**14


def test_a_third_of_a_scaled_loss_gives_a_third_of_the_gradients():
    x, y = torch.randn(8, 12), torch.randint(0, 4, (8,))
    net, scaler = mlp(), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    net(x, y).loss.backward()
    whole = {name: grad.clone() for name, grad in grads(net).items()}
    net.zero_grad()
    scaler.scale(net(x, y, grad_scaler=scaler).loss / 3).backward()
    for name, grad in grads(net).items():
        torch.testing.assert_close(grad / 2.0**10, whole[name] / 3)


def test_grad_scaler_skips_overflow():
    net = mlp()
    before = net.primary[0].weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with torch.autocast("cpu", dtype=torch.float16):
        out = net(torch.randn(8, 12), torch.randint(0, 4, (8,)), grad_scaler=scaler)
    scaler.scale(out.loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(net.primary[0].weight, before) and scaler.get_scale() == 2.0**119


def test_channels_last():
    net = small(ContSup("R1E"))
    x, y = batch()
    state = copy.deepcopy(net.state_dict())
    net(x, y).loss.backward()
    expected = {name: grad.clone() for name, grad in grads(net).items()}
    net.zero_grad()
    net.load_state_dict(state)
    net.to(memory_format=torch.channels_last)
    out = net(x.contiguous(memory_format=torch.channels_last), y)
    out.loss.backward()
    for name, grad in grads(net).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


def test_double():
    net = small(ContSup("R1E")).double()
    x, y = batch()
    out = net(x.double(), y)
    assert out.loss.dtype == torch.float64
    out.loss.backward()
    assert net.primary[0].conv.weight.grad.dtype == torch.float64
    layers = models.resnet_cifar(8, width=4).double()
    assert {p.dtype for p in LocalSequential(layers, AugLocal(2), 10, (3, 16, 16)).parameters()} == {torch.float64}

"""LocalStep on a GPU: graphs, streams, fused optimizers; equality with the eager path, no synchronisation, memory."""

from __future__ import annotations

import copy

import pytest
import torch
from step_nets import batches, small
from torch import nn

from auglocal_ext import AugLocal, LocalSequential, models
from auglocal_ext.memory import release_device_memory
from auglocal_ext.step import LocalStep

pytestmark = pytest.mark.gpu

SWITCHES = [{}, {"overlap": True}]


def sgd(params):
    return torch.optim.SGD(params, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)


def on_gpu(steps, n=64):
    for x, y in batches(steps, n):
        yield x.cuda(), y.cuda()


def pair(rule="auglocal", **options):
    net = small(rule, **options).cuda()
    return net, copy.deepcopy(net)


@pytest.fixture
def exact(monkeypatch):
    """fp32 arithmetic whose order does not change between two runs."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


@pytest.mark.parametrize("rule", ["auglocal", "contsup"])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_captured_steps_are_the_eager_ones(exact, rule, switches):
    net, other = pair(rule)
    step, eager = LocalStep(net, sgd, graph=True, **switches), LocalStep(other, sgd, graph=False, overlap=False)
    for x, y in on_gpu(10):
        torch.testing.assert_close(step(x, y).module_losses, eager(x, y).module_losses)
    assert step.graphed
    for (name, value), (_, theirs) in zip(net.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(value, theirs, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_400_steps_with_everything_on(exact):
    net, other = pair()
    step = LocalStep(net, sgd, graph=True, overlap=True)
    plain = sgd(other.parameters())
    for x, y in on_gpu(400):
        out = other(x, y)
        plain.zero_grad()
        out.loss.backward()
        plain.step()
        torch.testing.assert_close(step(x, y).loss, out.loss.detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("switches", [{"graph": False}, *SWITCHES, {"graph": False, "overlap": True}], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"autocast": torch.bfloat16}, {"autocast": torch.float16}, {"clip_norm": 1.0}, {"accumulate": 2}],
    ids=str,
)
def test_no_step_waits_for_the_device(switches, options):
    step = LocalStep(small().cuda(), sgd, **switches, **options)
    data = list(on_gpu(8))
    for x, y in data:
        step(x, y)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in data:
            step.optimizer.param_groups[0]["lr"] *= 0.9
            step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.graphed == (switches.get("graph") is not False)


@pytest.mark.parametrize(
    "make",
    [
        sgd,
        lambda params: torch.optim.SGD(params, lr=0.05),
        lambda params: torch.optim.Adam(params, lr=1e-3),
        lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.1),
        lambda params: torch.optim.RMSprop(params, lr=1e-3),
        lambda params: torch.optim.AdamW(params, lr=1e-3, foreach=True),
    ],
    ids=["sgd", "plain sgd", "adam", "adamw", "rmsprop", "foreach"],
)
def test_optimizers(exact, make):
    net, other = pair()
    step, plain = LocalStep(net, make), make(other.parameters())
    for index, (x, y) in enumerate(on_gpu(8)):
        plain.param_groups[0]["lr"] = step.optimizer.param_groups[0]["lr"] = 1e-3 / (1 + index)
        out = other(x, y)
        plain.zero_grad()
        out.loss.backward()
        plain.step()
        torch.testing.assert_close(step(x, y).loss, out.loss.detach(), rtol=1e-3, atol=1e-3)
    if "fused" in step.optimizer.defaults and not step.optimizer.defaults["foreach"]:
        assert all(group["fused"] for group in step.optimizer.param_groups)
        assert step.graphed, step.eager_reason


def test_checkpoints_of_the_cpu_go_on_on_the_gpu_and_back():
    def adam(params):
        return torch.optim.Adam(params, lr=1e-3)

    net = small()
    on_cpu = LocalStep(net, adam)
    for x, y in batches(2):
        on_cpu(x, y)
    other = copy.deepcopy(net).cuda()
    step = LocalStep(other, adam)
    step.load_state_dict(copy.deepcopy(on_cpu.state_dict()))
    for x, y in on_gpu(6):
        step(x, y)
    assert step.graphed
    back = LocalStep(copy.deepcopy(other).cpu(), adam)
    back.load_state_dict(copy.deepcopy(step.state_dict()))
    for x, y in batches(2):
        back(x, y)


def test_dropout_differs_at_every_replay():
    torch.manual_seed(1)
    layers = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.5)),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.5)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    ).cuda()
    net = LocalSequential(layers, AugLocal(1, pyramid=0.0), 10, (3, 16, 16))
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.0), graph=True)
    x, y = next(on_gpu(1))
    losses = [float(step(x, y).loss) for _ in range(10)]
    assert step.graphed
    assert len(set(losses)) == 10


def test_recomputed_dropout_is_not_captured():
    layers = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Dropout(0.5)),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)),
    ).cuda()
    net = LocalSequential(layers, AugLocal(1, pyramid=0.0), 10, (3, 16, 16), recompute="all")
    step = LocalStep(net, sgd)
    for x, y in on_gpu(6):
        step(x, y)
    assert "random" in step.eager_reason


@pytest.mark.parametrize("recompute", ["auxiliary", "all"])
def test_recomputation_is_captured(exact, recompute):
    net, other = pair()
    step, eager = LocalStep(net, sgd, graph=True, recompute=recompute), LocalStep(other, sgd, graph=False)
    for x, y in on_gpu(8):
        torch.testing.assert_close(step(x, y).module_losses, eager(x, y).module_losses)
    assert step.graphed


def test_fp16_overflow_skips_within_the_graph():
    net = small().cuda()
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24, growth_interval=10**6)
    step = LocalStep(net, sgd, autocast=torch.float16, grad_scaler=scaler, graph=True)
    for x, y in on_gpu(30):
        out = step(x, y)
    assert step.graphed
    assert scaler.get_scale() < 2.0**24
    assert torch.isfinite(out.loss) and all(torch.isfinite(p).all() for p in net.parameters())


def test_bad_labels_are_reported_and_do_not_stop_the_device():
    net = small().cuda()
    for graph in (False, True):
        step = LocalStep(net, sgd, graph=graph)
        x, y = next(on_gpu(1))
        for _ in range(5):
            step(x, y)
        wrong = y.clone()
        wrong[:2] = 10
        step(x, wrong)
        torch.cuda.synchronize()
        with pytest.raises(ValueError, match="2 .*labels"):
            step(x, y)
        step(x, y)


def big_step(**options):
    torch.manual_seed(0)
    net = LocalSequential(models.resnet32(), AugLocal(6), 10, (3, 32, 32)).cuda().to(memory_format=torch.channels_last)
    return LocalStep(net, sgd, autocast=torch.bfloat16, **options)


def test_the_captured_peak_is_the_eager_one():
    x = torch.randn(256, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    y = torch.randint(0, 10, (256,), device="cuda")
    peaks = {}
    for graph in (False, True):
        step = big_step(graph=graph)
        for _ in range(5):
            step(x, y)
        release_device_memory()
        for _ in range(3):
            step(x, y)
        torch.cuda.synchronize()
        # A graph's pool counts as allocated only while it is recorded; what it holds for good is reserved.
        peaks[graph] = torch.cuda.max_memory_reserved()
        del step
    assert peaks[True] <= 1.05 * peaks[False]


@pytest.mark.slow
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_ten_thousand_replays_reserve_no_more_memory(switches):
    step = LocalStep(small().cuda(), sgd, graph=True, **switches)
    x, y = next(on_gpu(1))
    for _ in range(10):
        step(x, y)
    torch.cuda.synchronize()
    reserved = torch.cuda.memory_reserved()
    for _ in range(10_000):
        out = step(x, y)
    assert torch.isfinite(out.loss)
    assert torch.cuda.memory_reserved() == reserved

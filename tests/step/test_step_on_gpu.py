"""LocalStep on a GPU: graphs, streams, fused optimizers; equality with the eager path, no synchronisation, memory."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from step_nets import batches, small
from torch import nn
from waits import no_waits

from auglocal_ext import AugLocal, LocalSequential
from auglocal_ext.step import LocalStep
from auglocal_ext.training.data.prefetch import make_feed

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


class Counted(torch.optim.Optimizer):
    """Counts its steps in Python."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.05})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["step"] = self.state[p].get("step", 0) + 1
                    p.sub_(group["lr"] * p.grad / self.state[p]["step"])


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
    with no_waits():
        for x, y in data:
            step.optimizer.param_groups[0]["lr"] *= 0.9
            step(x, y)
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


def read_on_host(module, args, out):
    return out * (1.0 if float(out.detach().sum()) == float("inf") else 1.0)


def read_in_a_capture(module, args, out):
    return read_on_host(module, args, out) if torch.cuda.is_current_stream_capturing() else None


def wrong_in_a_capture(module, args, out):
    if torch.cuda.is_current_stream_capturing():
        raise ValueError("by a layer")


def assert_same_weights(net, other):
    for (name, value), (_, theirs) in zip(net.state_dict().items(), other.state_dict().items(), strict=True):
        torch.testing.assert_close(value, theirs, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("mode", ["default", "warn"])
def test_a_step_that_waits_for_the_device_is_found_before_it_is_captured(exact, monkeypatch, mode):
    net, other = pair()
    for n in (net, other):
        n.local_modules[1].layers[0].register_forward_hook(read_on_host)
    monkeypatch.setattr("auglocal_ext.step.graph.CapturedGraph", None)
    step, eager = LocalStep(net, sgd), LocalStep(other, sgd, graph=False)
    torch.cuda.set_sync_debug_mode(mode)
    try:
        with pytest.warns(UserWarning, match="synchronizing") if mode == "warn" else nullcontext():
            for x, y in on_gpu(6):
                eager(x, y)
                step(x, y)
        assert torch.cuda.get_sync_debug_mode() == ("default", "warn").index(mode)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert f"local module 1 waits for the device ({__file__}:" in step.eager_reason
    assert_same_weights(net, other)


def test_a_wait_in_the_backward_is_found_too(monkeypatch):
    def read(module, grad_inputs, grad_outputs):
        assert grad_outputs[0].sum().item() is not None

    net = small().cuda()
    net.local_modules[1].layers[0].register_full_backward_hook(read)
    monkeypatch.setattr("auglocal_ext.step.graph.CapturedGraph", None)
    step = LocalStep(net, sgd)
    for x, y in on_gpu(6):
        step(x, y)
    assert "local module 1 waits for the device" in step.eager_reason


@pytest.mark.parametrize("hook", [read_in_a_capture, wrong_in_a_capture])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_a_capture_that_fails_leaves_the_device_as_it_was(exact, hook, switches):
    net, other = pair()
    for n in (net, other):
        n.local_modules[1].layers[0].register_forward_hook(hook)
    step, eager = LocalStep(net, sgd, **switches), LocalStep(other, sgd, graph=False)
    stream, offset = torch.cuda.current_stream(), torch.cuda.default_generators[0].get_offset()
    for x, y in on_gpu(8):
        eager(x, y)
        step(x, y)
    assert "capturing local module 1 failed" in step.eager_reason
    if hook is wrong_in_a_capture:
        assert "by a layer" in step.eager_reason
    assert_same_weights(net, other)
    assert torch.cuda.current_stream() == stream
    assert torch.cuda.default_generators[0].get_offset() == offset
    torch.rand(8, device="cuda")  # the generator counts again, and the allocator gives memory back
    assert torch.cuda.default_generators[0].get_offset() > offset
    torch.empty(2**26, device="cuda")
    before = torch.cuda.memory_reserved()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before - 2**28

    after = LocalStep(small().cuda(), sgd, graph=True, **switches)
    for x, y in on_gpu(6):
        after(x, y)
    assert after.graphed


def test_batches_of_a_feed_are_in_order_with_the_steps_after_a_failed_capture(exact):
    """A stream left current would be another than the one that the batches wait for."""
    net, other = pair()
    for n in (net, other):
        n.local_modules[1].layers[0].register_forward_hook(read_in_a_capture)
    step, eager = LocalStep(net, sgd), LocalStep(other, sgd, graph=False)

    def source():
        for x, y in on_gpu(30):
            torch.cuda._sleep(2_000_000)
            yield x + 0, y

    for x, y in make_feed(torch.device("cuda"))(source()):
        step(x, y)
    for x, y in on_gpu(30):
        eager(x, y)
    assert not step.graphed
    assert_same_weights(net, other)


def test_the_last_batch_has_a_graph_from_its_second_epoch_on(exact):
    net, other = pair()
    step, eager = LocalStep(net, sgd, graph=True), LocalStep(other, sgd, graph=False)
    graphed = []
    for _ in range(3):
        for index, (x, y) in enumerate(on_gpu(6)):
            x, y = (x[:24], y[:24]) if index == 5 else (x, y)
            torch.testing.assert_close(step(x, y).module_losses, eager(x, y).module_losses)
            graphed.append(step.graphed)
    assert graphed == [False] * 3 + [True] * 2 + [False] + [True] * 12
    assert_same_weights(net, other)


def test_replays_write_to_no_workspace_that_was_given_back(exact):
    """torch frees cuBLAS's workspaces when it destroys a graph or compiles one; split-K products write to them."""

    def wide():
        torch.manual_seed(3)
        layers = nn.Sequential(nn.Linear(4096, 64), nn.Linear(64, 64), nn.Linear(64, 10))
        return LocalSequential(layers, AugLocal(1, pyramid=0.0), 10, (4096,)).cuda()

    step, eager = LocalStep(wide(), sgd, graph=True), LocalStep(wide(), sgd, graph=False)
    x, y = torch.randn(4096, 4096, device="cuda"), torch.randint(0, 10, (4096,), device="cuda")
    for _ in range(5):
        step(x, y)
        eager(x, y)
    assert step.graphed
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    others = [torch.full((2**20,), 7.0, device="cuda") for _ in range(40)]  # what the freed blocks may have become
    for _ in range(3):
        torch.testing.assert_close(step(x, y).loss, eager(x, y).loss)
    assert all((other == 7.0).all() for other in others)


def test_a_graph_of_autograd_that_outlives_its_step_does_no_harm(exact):
    """Its nodes remember the stream they were made on, where a capture must not look."""
    net, other = pair()
    kept = net(*next(on_gpu(1))), other(*next(on_gpu(1)))
    step, eager = LocalStep(net, sgd), LocalStep(other, sgd, graph=False)
    for x, y in on_gpu(8):
        torch.testing.assert_close(step(x, y).module_losses, eager(x, y).module_losses)
    assert_same_weights(net, other)
    del kept


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_networks_on_two_devices(exact, switches):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    nets = [small().to(f"cuda:{index}") for index in (0, 1)]
    steps = [LocalStep(net, sgd, graph=True, **switches) for net in nets]
    for x, y in batches(8, 64):
        outs = [step(x.to(f"cuda:{index}"), y.to(f"cuda:{index}")) for index, step in enumerate(steps)]
        torch.testing.assert_close(outs[0].module_losses, outs[1].module_losses.to("cuda:0"))
    assert all(step.graphed for step in steps)
    assert torch.cuda.current_device() == 0
    assert_same_weights(nets[0].cpu(), nets[1].cpu())


@pytest.mark.parametrize("make", [Counted, lambda params: torch.optim.Adagrad(params, lr=0.1, foreach=True)])
def test_optimizers_that_count_on_the_host_are_not_captured(exact, make):
    net, other = pair()
    step, eager = LocalStep(net, make), LocalStep(other, make, graph=False)
    for x, y in on_gpu(8):
        torch.testing.assert_close(step(x, y).module_losses, eager(x, y).module_losses)
    assert not step.graphed
    assert_same_weights(net, other)

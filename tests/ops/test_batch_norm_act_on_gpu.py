"""batch_norm_act on a GPU: streams, graphs, devices, and maps of more than 2**31 elements."""

from __future__ import annotations

import column
import pytest
import torch
from test_batch_norm_act import compare, inputs
from torch import Tensor
from waits import no_waits

from auglocal_ext.ops import (
    batch_norm_act,
    batch_norm_act_apply,
    batch_norm_act_input_grad,
    batch_norm_act_reduce,
    batch_norm_stats,
)

OP = "batch_norm_act"


@column.gpu_cases
def test_side_stream(device: str, provider: str) -> None:
    x, weight, bias, mean, var, residual = inputs((64, 128, 32, 32), torch.float32, device)
    leaves = [t.requires_grad_() for t in (weight, bias)]

    def run(x: Tensor) -> list[Tensor]:
        y = batch_norm_act(x, *leaves, mean.clone(), var.clone(), residual=residual, training=True, provider=provider)
        return [y.detach(), *torch.autograd.grad(y.sum(), leaves)]

    column.assert_follows_the_stream(run, x)


@column.gpu_cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_graph_capture(device: str, provider: str, layout: str) -> None:
    x, weight, bias, mean, var, residual = inputs((16, 32, 8, 8), torch.bfloat16, device)
    x = column.LAYOUTS[layout](x)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def step() -> list[Tensor]:
        y = batch_norm_act(*leaves[:3], mean, var, residual=leaves[3], training=True, provider=provider)
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]

    column.assert_replays(step, x, mean, var)


@column.gpu_cases
def test_graph_replays_beside_calls_on_the_stream_of_its_capture(device: str, provider: str) -> None:
    captured, called = (torch.randn(64, 64, 32, 32, device=device) + i for i in range(2))
    x, y = (column.LAYOUTS["channels-last"](t) for t in (captured, called))
    expected = batch_norm_stats(x, provider=provider), batch_norm_stats(y, provider=provider)
    own, other = torch.cuda.Stream(), torch.cuda.Stream()
    own.wait_stream(torch.cuda.current_stream())
    other.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=own):
        replayed = batch_norm_stats(x, provider=provider)
    for _ in range(50):  # blocks of both at once must not draw each other's tickets
        with torch.cuda.stream(other):
            graph.replay()
        with torch.cuda.stream(own):
            eager = batch_norm_stats(y, provider=provider)
        torch.cuda.synchronize()
        for found, wanted in zip((*replayed, *eager), (*expected[0], *expected[1]), strict=True):
            assert torch.equal(found, wanted)


@column.gpu_cases
def test_second_device(device: str, provider: str) -> None:
    column.assert_runs_beside_the_current_device(
        lambda other: compare(*inputs((5, 7, 3, 4), torch.float32, other), provider, training=True)
    )


@column.gpu_cases
def test_does_not_synchronise(device: str, provider: str) -> None:
    x, weight, bias, mean, var, residual = inputs((16, 32, 8, 8), torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias, residual)]

    def step() -> None:
        y = batch_norm_act(*leaves[:3], mean, var, residual=leaves[3], training=True, provider=provider)
        torch.autograd.grad(y, leaves, x)

    step()
    with no_waits():
        step()


@pytest.mark.large
@column.gpu_cases
@pytest.mark.parametrize("layout", ["contiguous", "channels-last"])
def test_more_than_two_billion_elements(device: str, provider: str, layout: str) -> None:
    if provider == "reference":
        pytest.skip("plain torch, several copies of the map in float32")
    channels = 16
    x = column.LAYOUTS[layout](torch.randn(33, channels, 2048, 2048, dtype=torch.float16, device=device))
    assert x.numel() > 2**31
    mean, var = batch_norm_stats(x, provider=provider)
    torch.testing.assert_close(mean, x.mean((0, 2, 3), dtype=torch.float32), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(var, torch.ones_like(var), rtol=1e-3, atol=0)
    rstd, none = var.rsqrt(), (None, None, None)
    y = batch_norm_act_apply(x, mean, rstd, *none, "none", provider=provider)
    last = (x[-1].float() - mean[:, None, None]) * rstd[:, None, None]
    torch.testing.assert_close(y[-1].float(), last, rtol=2e-3, atol=1e-3)
    sums = batch_norm_act_reduce(y, x, mean, rstd, *none, "relu", provider=provider)
    count = x.numel() // channels
    torch.testing.assert_close(sums[1] / count, torch.full_like(var, 0.5), rtol=1e-2, atol=0)
    grad_x, _ = batch_norm_act_input_grad(
        *(y, x, mean, rstd, *none, "relu", 0.0, *sums, True, False), provider=provider
    )
    masked = torch.where(last > 0, y[-1].float(), 0)
    expected = masked - (sums[0] / count)[:, None, None] - last * (sums[1] / count)[:, None, None]
    torch.testing.assert_close(grad_x[-1].float(), expected * rstd[:, None, None], rtol=4e-3, atol=4e-3)

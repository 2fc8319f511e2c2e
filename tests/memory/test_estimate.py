"""Prediction of a training step, and what a report keeps."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from auglocal_ext.memory import MEASURED, PREDICTED, MemoryMeter, decimate, estimate_step, measure_step
from auglocal_ext.memory.meter import ACTIVATIONS, GRADIENTS, INPUTS, OPTIMIZER_STATE, PARAMETERS

WEIGHT = 4 * 256 * 256


def build_step():
    net = nn.Linear(256, 256, bias=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, foreach=True)
    x, y = torch.randn(64, 256), torch.randint(0, 256, (64,))

    def step(mark):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        mark("backward")
        loss.backward()
        mark("optimizer")
        optimizer.step()

    return step, (net, optimizer, x, y)


def test_prediction_of_a_step_by_hand():
    report = estimate_step(build_step, flops=True)
    batch, fixed = 4 * 64 * 256, 2 * WEIGHT + 4 * 64 * 256 + 8 * 64
    assert report.kind == PREDICTED
    assert report.live_before == fixed + WEIGHT  # the gradient of the step before
    assert report.live_after == fixed + WEIGHT
    # The gradient is made last, from x and the gradient of the logits (log-softmax's output is gone with its
    # node); the loss, its total weight and the gradient seed hold 512 bytes each.
    assert fixed + WEIGHT + batch <= report.peak_bytes <= fixed + WEIGHT + batch + 3 * 512
    assert report.categories[PARAMETERS] == report.categories[GRADIENTS] == WEIGHT
    assert report.categories[OPTIMIZER_STATE] == WEIGHT
    assert report.categories[INPUTS] == batch + 8 * 64
    assert report.categories[ACTIVATIONS] == report.peak_bytes - fixed - WEIGHT
    assert report.flops == 2 * 2 * 64 * 256 * 256
    assert [mark.label for mark in report.marks] == ["backward", "optimizer"]
    assert max(live for _, live in report.timeline) == report.peak_bytes
    assert (report.median_seconds, report.reserved_peak_bytes) == (None, None)


def test_prediction_needs_no_memory():
    def terabytes():
        net = nn.Linear(1_000_000, 1_000_000, bias=False)
        x = torch.empty(1000, 1_000_000)
        return (lambda mark: net(x).sum().backward()), (net, x)

    assert estimate_step(terabytes).peak_bytes > 8e12


def test_report_becomes_json():
    values = json.loads(json.dumps(estimate_step(build_step).as_dict(timeline_points=10)))
    assert values["kind"] == PREDICTED
    assert len(values["timeline"]) <= 12
    assert max(live for _, live in values["timeline"]) == values["peak_bytes"]
    assert values["marks"][0]["label"] == "backward"


def test_decimation_keeps_ends_and_peaks():
    timeline = [(i, (i * 7919) % 1000) for i in range(5000)]
    timeline[1234] = (1234, 10_000)
    timeline[4321] = (4321, -1)
    thin = decimate(timeline, 100)
    assert len(thin) <= 102
    assert thin[0] == timeline[0] and thin[-1] == timeline[-1]
    assert timeline[1234] in thin and timeline[4321] in thin
    assert thin == sorted(thin)
    assert decimate(timeline[:50], 100) == timeline[:50]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message of a machine without CUDA")
def test_measuring_without_cuda_says_what_to_do():
    with pytest.raises(RuntimeError, match="estimate_step"):
        measure_step(build_step)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_measured_step_agrees_with_the_prediction():
    predicted = estimate_step(build_step)
    measured = measure_step(build_step, warmup=2, repeats=3)
    assert measured.kind == MEASURED
    assert len(measured.seconds) == 3 and measured.median_seconds > 0
    assert measured.reserved_peak_bytes >= measured.peak_bytes >= measured.requested_peak_bytes
    # a matrix product's workspace, tens of MB, comes on top
    assert predicted.peak_bytes <= measured.peak_bytes < predicted.peak_bytes + 200e6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_meter_counts_on_a_gpu_what_it_counts_on_fake_tensors():
    """Backward runs in another thread there, and the same storages must be seen."""
    with torch.device("cuda"):
        step, tracked = build_step()
    step(lambda label: None)
    with MemoryMeter() as meter:
        meter.track(*tracked)
        step(meter.mark)
    assert meter.peak_bytes == pytest.approx(estimate_step(build_step).peak_bytes, abs=8 * 512)


def test_networks_that_copy_their_parts_are_predicted():
    def build(copied: bool):
        first = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        first[0].bias.requires_grad_(False)
        second = copy.deepcopy(first) if copied else nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        second[0].bias.requires_grad_(False)
        net = nn.ModuleList([first, second])
        assert len(set(net.parameters()) | set(net.buffers())) == 2 * (4 + 3)
        x = torch.randn(4, 3, 8, 8)

        def step(mark):
            (first(x) + second(x)).sum().backward()
            assert [p.grad is None for p in net.parameters()] == [False, True, False, False] * 2

        return step, (net, x)

    found, expected = estimate_step(lambda: build(True)), estimate_step(lambda: build(False))
    assert found.peak_bytes == expected.peak_bytes and found.categories == expected.categories


@pytest.mark.parametrize(
    ("dtype", "weight", "half", "kept"),
    [
        (torch.float32, torch.float32, False, 4),
        (torch.bfloat16, torch.bfloat16, False, 2),
        (torch.bfloat16, torch.float32, True, 4 + 4),  # autocast makes a float32 copy of the input
    ],
)
def test_rms_norm_is_counted_as_on_cuda(dtype, weight, half, kept):
    """One kernel, which keeps its input and a number per row; on a CPU more is kept."""
    rows, width = 128, 1024

    def build():
        x = torch.randn(rows, width, dtype=dtype).requires_grad_()
        norm, outs = nn.RMSNorm(width, dtype=weight), []

        def step(mark):
            outs.clear()
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                outs.append(norm(x))

        return step, (norm, x)

    report = estimate_step(build)
    assert report.peak_bytes - report.live_before == kept * rows * width + 4 * rows


def test_the_gradients_of_rms_norm_are_counted():
    def build():
        norm = nn.RMSNorm(1024)
        x = torch.randn(128, 1024).requires_grad_()

        def step(mark):
            norm.zero_grad()
            x.grad = None
            norm(x).sum().backward()

        return step, (norm, x)

    report = estimate_step(build)
    assert report.live_after == 2 * 4 * 1024 + 2 * 4 * 128 * 1024  # weight, input, and a gradient of each

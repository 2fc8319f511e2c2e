"""Memory of one training step: predicted under fake tensors, or measured on a CUDA device.

A prediction runs two steps and reports the second, when the optimizer's momentum exists, as ``max_memory_allocated``
does after a warm-up. The fake device is the CPU, because backward on fake CUDA tensors fails without a GPU. On a GPU
``measure_step`` adds allocated, reserved and driver bytes of the same step.

Known figures check the prediction (batch 1024, ResNet-32 and ResNet-110): backpropagation takes 2.58 and 8.70 GB.
AugLocal with d = 6, run as the released loop (over ``net.local_modules``, torch's pooling in the heads,
``fused=False``), takes 1.12 and 1.21 GB. ``net(x, y)`` is 1 to 3 % below, because the feature gradient of a pooled
head is (N, C) and never a map. Fused it is 0.89 and 0.97 GB (0.46 and 0.55 under bf16 autocast): the raw convolution
outputs and the inputs of the blocks.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from auglocal_ext._torch import FakeTensorMode
from auglocal_ext.cost import count_flops
from auglocal_ext.memory.cuda_forms import cuda_forms
from auglocal_ext.memory.device import read_device_memory, release_device_memory
from auglocal_ext.memory.meter import Mark, MemoryMeter

#: Kind of a report that :func:`estimate_step` makes.
PREDICTED = "predicted"
#: Kind of a report that :func:`measure_step` makes.
MEASURED = "measured"

Step = Callable[[Callable[[str], None]], Any]
BuildStep = Callable[[], tuple[Step, Sequence[Any]]]


@dataclass(frozen=True)
class MemoryReport:
    """Memory of one training step, in bytes.

    A predicted report counts tensor bytes under fake tensors, without library workspaces. It has a timeline, marks and
    categories. A measured report comes from CUDA. It has the figures of the allocator and the driver, and times. What
    only the other kind has is None or empty.

    Attributes:
        kind: ``"predicted"`` or ``"measured"``.
        peak_bytes: largest number of live bytes; measured: allocated bytes.
        live_before: live bytes when the step began.
        live_after: live bytes when it ended.
        timeline: ``(event, live bytes)`` at every change.
        marks: named points of the timeline.
        categories: live bytes at the peak by category, see :data:`auglocal_ext.memory.CATEGORIES`.
        flops: floating-point operations, 2 per multiply-accumulate, if they were counted.
        requested_peak_bytes: allocated peak before rounding to blocks.
        reserved_peak_bytes: peak of what the allocator holds from the driver.
        warmup_peak_bytes: allocated peak of the warm-up, where cuDNN's benchmark tries out workspaces.
        driver_used_bytes: what the driver reports as used, by all processes.
        driver_total_bytes: memory of the device.
        seconds: time of each repeated step.
    """

    kind: str
    peak_bytes: int
    live_before: int
    live_after: int
    timeline: tuple[tuple[int, int], ...] = ()
    marks: tuple[Mark, ...] = ()
    categories: dict[str, int] | None = None
    flops: int | None = None
    requested_peak_bytes: int | None = None
    reserved_peak_bytes: int | None = None
    warmup_peak_bytes: int | None = None
    driver_used_bytes: int | None = None
    driver_total_bytes: int | None = None
    seconds: tuple[float, ...] = ()

    @property
    def median_seconds(self) -> float | None:
        """Median time of one step; None for a prediction."""
        return statistics.median(self.seconds) if self.seconds else None

    def as_dict(self, timeline_points: int = 1000) -> dict[str, Any]:
        """Plain values for JSON, the timeline thinned to about ``timeline_points`` points, peaks kept."""
        values = asdict(self)
        values["timeline"] = decimate(self.timeline, timeline_points)
        values["seconds_median"] = self.median_seconds
        return values


def estimate_step(build_step: BuildStep, *, flops: bool = False) -> MemoryReport:
    """Predict the tensor bytes of one training step on any machine, with no GPU and no memory.

    ``build_step()`` runs under ``FakeTensorMode`` on fake CPU tensors and returns ``(step, tracked)``:
    ``step(mark)`` runs one whole training step and may name its phases, ``mark("backward")``; ``tracked`` are
    the modules, optimizers and tensors that live across steps. Two steps run and the second is reported: the
    optimizer's state, which the first step makes, is there, as in the peak of a real run after its warm-up.

    Counted is every storage that operators make and return, rounded up to 512 bytes; not counted are library
    workspaces (cuDNN), fragmentation and the CUDA context. RMSNorm is counted in the form that it has on CUDA.
    An optimizer chooses ``foreach`` by the device: pass ``foreach=True`` to predict a GPU's step, whose
    temporaries can be as large as all gradients.

    Args:
        build_step: makes the training step, as above; data-dependent Python (``.item()``) cannot run in it.
        flops: also count the floating-point operations of a step (2 per multiply-accumulate).
    """
    with FakeTensorMode():
        with _DeepCopies():
            step, tracked = build_step()
        count = None
        with cuda_forms():
            if flops:
                count = count_flops(lambda: step(_unmarked))
            else:
                step(_unmarked)
            with MemoryMeter() as meter:
                meter.track(*tracked)
                before = meter.live_bytes
                step(meter.mark)
    return MemoryReport(
        kind=PREDICTED,
        peak_bytes=meter.peak_bytes,
        live_before=before,
        live_after=meter.live_bytes,
        timeline=tuple(meter.timeline),
        marks=tuple(meter.marks),
        categories=meter.peak_categories,
        flops=count,
    )


class _DeepCopies(TorchFunctionMode):
    """``copy.deepcopy`` of a fake tensor, whose storage torch cannot copy, is a clone."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                copied = tensor.detach().clone()
                if isinstance(tensor, torch.nn.Parameter):
                    copied = torch.nn.Parameter(copied, tensor.requires_grad)
                memo[id(tensor)] = copied
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def measure_step(
    build_step: BuildStep, device: torch.device | str = "cuda", *, warmup: int = 3, repeats: int = 10
) -> MemoryReport:
    """Measure one training step on a CUDA device: allocated, reserved and driver bytes, and time.

    The peaks are those of ``repeats`` steps, after ``warmup`` steps and with an emptied cache.

    Args:
        build_step: as for :func:`estimate_step`. It runs under ``torch.device(device)``, which puts what it makes on
            the device; the steps do not.
        device: a CUDA device.
        warmup: steps before the measurement.
        repeats: measured steps.

    Raises:
        RuntimeError: without CUDA.
        torch.OutOfMemoryError: if the step does not fit.
    """
    device = torch.device(device)
    release_device_memory(device)
    with torch.device(device):  # for what build_step makes; in the steps it would cost time at every operator
        step, _ = build_step()
    for _ in range(warmup):
        step(_unmarked)
    warm = read_device_memory(device)
    release_device_memory(device)
    before = read_device_memory(device)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    with torch.cuda.device(device):
        events[0].record()
        for event in events[1:]:
            step(_unmarked)
            event.record()
    after = read_device_memory(device)
    return MemoryReport(
        kind=MEASURED,
        peak_bytes=after.allocated_peak,
        live_before=before.allocated,
        live_after=after.allocated,
        requested_peak_bytes=after.requested_peak,
        reserved_peak_bytes=after.reserved_peak,
        warmup_peak_bytes=warm.allocated_peak,
        driver_used_bytes=after.driver_used,
        driver_total_bytes=after.driver_total,
        seconds=tuple(first.elapsed_time(last) / 1e3 for first, last in zip(events, events[1:], strict=False)),
    )


def decimate(timeline: Sequence[tuple[int, int]], points: int) -> list[tuple[int, int]]:
    """A timeline thinned to at most about ``points`` points; each run of points keeps its lowest and highest."""
    if len(timeline) <= points:
        return list(timeline)
    size = -(-2 * len(timeline) // points)
    kept: set[int] = {0, len(timeline) - 1}
    for start in range(0, len(timeline), size):
        run = range(start, min(start + size, len(timeline)))
        kept.add(min(run, key=lambda i: timeline[i][1]))
        kept.add(max(run, key=lambda i: timeline[i][1]))
    return [timeline[i] for i in sorted(kept)]


def _unmarked(label: str) -> None:
    """A step run only to warm up has no timeline to mark."""

"""What one training step asks of the host: operators, launches, and reads of values that make it wait for a device."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from auglocal_ext._torch import TorchDispatchMode, schema

# Operators whose result the host needs, or whose result's shape depends on values: on CUDA each waits for the device.
HOST_READS = frozenset(
    {
        "aten::_local_scalar_dense",
        "aten::equal",
        "aten::is_nonzero",
        "aten::masked_select",
        "aten::nonzero",
        "aten::_unique2",
        "aten::unique_consecutive",
        "aten::unique_dim",
    }
)
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
_LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch")
_COPIES = ("cudaMemcpy", "cudaMemset")
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_RANGE = "counted step"


class OperatorCounter(TorchDispatchMode):
    """Counts operators, and by name those that read a value on the host.

    Works on any device, so that a CPU shows what would make a GPU wait. ``Tensor.tolist`` and ``numpy`` of a CPU tensor
    run no operator and are not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.host_reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # a question, not an operator
            return func(*args)
        self.operators += 1
        name = schema(func).name
        if name in HOST_READS or (name in _INDEXING and _by_mask(args[1])):
            self.host_reads[name] += 1
        return func(*args, **(kwargs or {}))


def _by_mask(indices: Any) -> bool:
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices)


def count_operators(step: Callable[[], Any]) -> dict[str, Any]:
    """``operators`` and ``host_reads`` of one step, with the names of the latter."""
    with OperatorCounter() as counter:
        step()
    return {
        "operators": counter.operators,
        "host_reads": counter.host_reads.total(),
        "host_reads_by_name": dict(counter.host_reads),
    }


def count_synchronisations(step: Callable[[], Any]) -> int:
    """Waits for the device in one step, as torch itself notices them (``torch.cuda.set_sync_debug_mode``)."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)


def count_launches(step: Callable[[], Any]) -> dict[str, Any]:
    """Kernel and graph launches, copies and waits that one step asks of the CUDA runtime and driver."""
    torch.cuda.synchronize()
    return runtime_calls(host_events(step, [ProfilerActivity.CPU, ProfilerActivity.CUDA]))


def host_events(step: Callable[[], Any], activities: list[ProfilerActivity]) -> list[tuple[str, int, int]]:
    """``(name, start, end)`` of all that the host did around one step, which is the range "counted step"."""
    with profile(activities=activities, acc_events=True) as profiler:
        with record_function(_RANGE):
            step()
    # The raw events: to make the profiler's tree of them takes seconds a step. The device has a range of the same
    # name, which ends later, when its work is done.
    found = profiler.profiler.kineto_results.events()
    return [(e.name(), e.start_ns(), e.end_ns()) for e in found if e.device_type() == DeviceType.CPU]


def runtime_calls(events: Sequence[tuple[str, int, int]]) -> dict[str, Any]:
    """Counts of the calls within the step, from :func:`host_events`.

    The profiler's own waits, before and after the step, do not count.
    """
    spans = [(start, end) for name, start, end in events if name == _RANGE]
    if not spans:
        raise RuntimeError("the profiler recorded no step; is another profiler at work?")
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    within = Counter(name for name, start, _ in events if first <= start <= last)
    calls = {name: n for name, n in within.items() if name.startswith((*_LAUNCHES, *_COPIES, *_WAITS))}

    def total(prefixes: tuple[str, ...]) -> int:
        return sum(n for name, n in calls.items() if name.startswith(prefixes))

    return {"launches": total(_LAUNCHES), "copies": total(_COPIES), "waits": total(_WAITS), "calls_by_name": calls}

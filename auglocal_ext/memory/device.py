"""What CUDA says about its memory: the caching allocator's figures and the driver's."""

from __future__ import annotations

import gc
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on one CUDA device.

    Attributes:
        allocated: tensors and library workspaces, in the allocator's blocks.
        allocated_peak: its peak.
        requested_peak: peak of the same before rounding to blocks.
        reserved: what the allocator holds from the driver, free blocks included.
        reserved_peak: its peak.
        driver_used: what the driver reports as used, by every process and by CUDA contexts.
        driver_total: memory of the device.
    """

    allocated: int
    allocated_peak: int
    requested_peak: int
    reserved: int
    reserved_peak: int
    driver_used: int
    driver_total: int


def read_device_memory(device: torch.device | str | int | None = None) -> DeviceMemory:
    """Allocated, reserved and driver figures of a CUDA device, after the work submitted so far is done.

    Raises:
        RuntimeError: if torch sees no CUDA device.
    """
    _require_cuda()
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(
        allocated=stats.get("allocated_bytes.all.current", 0),
        allocated_peak=stats.get("allocated_bytes.all.peak", 0),
        requested_peak=stats.get("requested_bytes.all.peak", 0),
        reserved=stats.get("reserved_bytes.all.current", 0),
        reserved_peak=stats.get("reserved_bytes.all.peak", 0),
        driver_used=total - free,
        driver_total=total,
    )


def release_device_memory(device: torch.device | str | int | None = None) -> None:
    """Collect garbage, give the allocator's free blocks back to the driver, restart the peaks."""
    _require_cuda()
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)


def _require_cuda() -> None:
    if not torch.cuda.is_available():
        raise RuntimeError(
            "expected a CUDA device, torch sees none; auglocal_ext.memory.estimate_step predicts without one"
        )

"""Memory of a training step: count it, predict it without a GPU, measure it on one, draw it."""

from __future__ import annotations

from auglocal_ext.memory.device import DeviceMemory, read_device_memory, release_device_memory
from auglocal_ext.memory.estimate import (
    MEASURED,
    PREDICTED,
    MemoryReport,
    decimate,
    estimate_step,
    measure_step,
)
from auglocal_ext.memory.meter import CATEGORIES, LiveStorage, Mark, MemoryMeter
from auglocal_ext.memory.plot import PlotRow, plot_memory

__all__ = [
    "CATEGORIES",
    "MEASURED",
    "PREDICTED",
    "DeviceMemory",
    "LiveStorage",
    "Mark",
    "MemoryMeter",
    "MemoryReport",
    "PlotRow",
    "decimate",
    "estimate_step",
    "measure_step",
    "plot_memory",
    "read_device_memory",
    "release_device_memory",
]

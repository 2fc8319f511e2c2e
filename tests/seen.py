"""A network as a rule sees it, of one local module that puts out given features, for tests of single parts."""

from __future__ import annotations

from torch import nn

from auglocal_ext import Classification, Task
from auglocal_ext.auxiliary import LossSettings
from auglocal_ext.layers import Features, Layer, vectors
from auglocal_ext.rules import Network


def settings(task: Task | int = 10, recompute: bool = False) -> LossSettings:
    return LossSettings(Classification(task) if isinstance(task, int) else task, recompute)


def network(features: Features, task: Task | int = 10, last_width: int = 64) -> Network:
    """Module 0 puts out ``features``; the network's last stage has ``last_width`` channels."""
    task = Classification(task) if isinstance(task, int) else task
    first = Layer(0, 0, 1, "other", None, features.shape, features, features.channels, "a layer")
    last = Layer(
        1, 1, 2, "linear", nn.Linear(2, last_width), (task.outputs,), vectors(task.outputs), last_width, "Linear"
    )
    return Network(nn.Sequential(), (first, last), (3, 8, 8), task, (0, 1), Features((3, 8, 8)))

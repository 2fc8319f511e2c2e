"""Short runs of the trainer, and what their logs say."""

from __future__ import annotations

import csv
import signal

import pytest

from auglocal_ext.training import Trainer

RULES = [
    pytest.param({"rule": "bp"}, id="bp"),
    pytest.param({"rule": "auglocal", "depth": 2}, id="auglocal"),
    pytest.param({"rule": "contsup", "context": "R1E"}, id="contsup"),
]
# Times differ from run to run; everything else in the log may not.
TIMES = ("images_per_second", "seconds", "waiting", "peak_bytes")


def trainer(config, data):
    return Trainer(config, data, bars=False, say=lambda line: None)


def log(config):
    with open(f"{config.output}/log.csv", newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def waiting(config):
    """Per epoch the fraction of its time spent waiting for batches, and its seconds."""
    with open(f"{config.output}/log.csv", newline="") as file:
        return [(float(row["waiting"]), float(row["seconds"])) for row in csv.DictReader(file)]


def interrupt_after(run, steps):
    """Ctrl-C, really raised as a signal, within the given step of the run."""
    step, count = run._learner.step, 0

    def counted(*arguments):
        nonlocal count
        count += 1
        if count == steps:
            signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    run._learner.step = counted

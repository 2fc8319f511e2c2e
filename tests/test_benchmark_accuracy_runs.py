"""benchmarks/accuracy.py with real training: a run that is taken up ends as a whole one; AugLocal beats greedy.

The processes are forked (``forked.py``). ``test_benchmark_accuracy.py`` starts real ones, and has what else there is.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import forked
import numpy as np
import pytest
from test_benchmark_accuracy import data, write_images  # noqa: F401

pytestmark = pytest.mark.slow


@pytest.fixture
def run(load_benchmark, monkeypatch):
    """``run(images, output, *arguments)`` is the exit status of the benchmark and its report."""
    benchmark = load_benchmark("accuracy")
    import _accuracy_runs

    monkeypatch.setattr(_accuracy_runs, "subprocess", forked)

    def call(images, output, *arguments):
        status = benchmark.main(["--data", str(images), "--device", "cpu", "--output", str(output), *arguments])
        return status, json.loads((output / "accuracy.json").read_text())["runs"]

    return call


def test_a_run_is_taken_up_to_the_step(run, data, tmp_path):  # noqa: F811
    arguments = ["--rows", "AugLocal d=2", "--epochs", "12", "--settings", "--width 4 --batch-size 8 --lr 0.05"]
    status, (once,) = run(data, tmp_path / "whole", *arguments)
    assert status == 0
    log = tmp_path / "parts" / "runs" / "resnet8-auglocal-d2-12ep-seed1234" / "log.csv"

    def stop():
        while not log.exists() or len(log.read_text().splitlines()) < 5:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    status, (begun,) = run(data, tmp_path / "parts", *arguments)
    thread.join()
    assert status == 130 and 4 <= begun["epochs_done"] < 12
    status, (twice,) = run(data, tmp_path / "parts", *arguments)
    assert status == 0 and len(twice["sittings"]) == 2 and len(once["sittings"]) == 1
    figures = [[line.split(",")[:7] for line in run["log"]] for run in (once, twice)]
    assert figures[0] == figures[1] and len(figures[0]) == 13


def relations(count, seed):
    """Grey images of 16 x 16 with two small marks, vertical and horizontal stripes, in strong noise; and their labels.

    The label says on which side of the first mark the second one lies, four to six pixels away. A classifier on the
    pooled output of a 3x3 layer sees which marks there are, and these are the same in all classes: so greedy learning's
    first modules have nothing to learn from, and the noise drowns what they hand on. AugLocal's auxiliary networks look
    at a layer through a convolution that spans both marks.
    """
    generator = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    images = 128 + generator.normal(0, 30, (count, 16, 16, 1)) + generator.normal(0, 15, (count, 16, 16, 3))
    stripes = np.tile([1.0, -1.0, 1.0], (3, 1))
    for image, label in zip(images, labels, strict=True):
        along = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)][label])
        offset = along * generator.integers(4, 7) + along[::-1] * generator.integers(-1, 2)
        # Three pixels from the border: the augmentation shifts images by two.
        first = generator.integers(3 + np.maximum(0, -offset), 11 - np.maximum(0, offset))
        contrast = generator.uniform(60, 100)
        for (y, x), mark in ((first, stripes), (first + offset, stripes.T)):
            image[y : y + 3, x : x + 3] += contrast * generator.choice([-1, 1]) * mark[..., None]
    return images, labels


def test_auglocal_beats_greedy(run, tmp_path):
    sides = ("right", "left", "below", "above")
    images = write_images(tmp_path / "images", {"train": relations(2000, 0), "test": relations(500, 1)}, sides)
    # SVHN's recipe does not mirror images, which would turn left into right.
    settings = "--recipe svhn --width 8 --batch-size 64 --lr 0.1 --channels-last"
    rows = ["--rows", "AugLocal d=2", "Greedy", "--seeds", "1", "2", "--epochs", "4"]
    status, runs = run(images, tmp_path / "out", *rows, "--settings", settings)
    assert status == 0
    last = {(run["row"], run["seed"]): run["last_test_accuracy"] for run in runs}
    for seed in (1, 2):  # about 0.99 and 0.3 to 0.5, chance is 0.25; after six epochs Greedy may have 0.75
        assert last["AugLocal d=2", seed] > 0.9
        assert last["AugLocal d=2", seed] > last["Greedy", seed] + 0.2

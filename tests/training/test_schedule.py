"""The learning rate, epoch by epoch, against the formula of the released code worked out by hand."""

from __future__ import annotations

import math

import pytest

from auglocal_ext.training.schedule import default_warmup, learning_rate


def test_first_epochs_of_the_cifar_recipe():
    def c(epoch):
        return 0.4 * (1 + math.cos(math.pi * epoch / 400))

    assert learning_rate(1, 400, 0.8, 10) == pytest.approx(0.01)
    assert learning_rate(2, 400, 0.8, 10) == pytest.approx(c(2) * 0.1 + 0.009)
    assert learning_rate(10, 400, 0.8, 10) == pytest.approx(c(10) * 0.9 + 0.001)
    assert learning_rate(11, 400, 0.8, 10) == pytest.approx(c(11))
    assert learning_rate(200, 400, 0.8, 10) == pytest.approx(0.4)
    assert learning_rate(400, 400, 0.8, 10) == pytest.approx(0.0)


def test_without_warmup_it_is_the_cosine():
    assert learning_rate(1, 2, 0.1, 0) == pytest.approx(0.05)


def test_warmup_never_starts_above_the_peak():
    assert learning_rate(1, 100, 0.001, 10) == pytest.approx(0.001)


@pytest.mark.parametrize(("epochs", "warmup"), [(400, 10), (40, 10), (39, 9), (8, 2), (3, 0)])
def test_short_runs_shorten_the_default_warmup_to_a_quarter(epochs, warmup):
    assert default_warmup(10, epochs) == warmup


@pytest.mark.parametrize("epoch", [0, 5])
def test_epochs_count_from_one(epoch):
    with pytest.raises(ValueError, match="from 1 to 4"):
        learning_rate(epoch, 4, 0.1, 0)


def test_one_epoch_has_a_rate():
    assert learning_rate(1, 1, 0.1, 0) == 0.1

"""The learning rate, epoch by epoch, against the formula of the released code worked out by hand."""

from __future__ import annotations

import math

import pytest

from auglocal_ext.training.config.recipes import names, read
from auglocal_ext.training.config.schedule import SCHEDULES, default_schedule, default_warmup, learning_rate


def test_first_epochs_of_the_cifar_recipe():
    def c(epoch):
        return 0.4 * (1 + math.cos(math.pi * epoch / 400))

    def rate(epoch):
        return learning_rate(epoch, 400, 0.8, 10, "published")

    assert rate(1) == pytest.approx(0.01)
    assert rate(2) == pytest.approx(c(2) * 0.1 + 0.009)
    assert rate(10) == pytest.approx(c(10) * 0.9 + 0.001)
    assert rate(11) == pytest.approx(c(11))
    assert rate(200) == pytest.approx(0.4)
    assert rate(400) == pytest.approx(0.0)


def test_without_warmup_it_is_the_cosine():
    assert learning_rate(1, 2, 0.1, 0, "published") == pytest.approx(0.05)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_never_starts_above_the_peak(schedule):
    assert learning_rate(1, 100, 0.001, 10, schedule) == pytest.approx(0.001, rel=1e-4)


@pytest.mark.parametrize(("epochs", "warmup"), [(400, 10), (40, 10), (39, 9), (8, 2), (3, 0)])
def test_short_runs_shorten_the_default_warmup_to_a_quarter(epochs, warmup):
    assert default_warmup(10, epochs) == warmup


@pytest.mark.parametrize("epoch", [0, 5])
def test_epochs_count_from_one(epoch):
    with pytest.raises(ValueError, match="from 1 to 4"):
        learning_rate(epoch, 4, 0.1, 0, "short")


def test_one_epoch_has_a_rate():
    assert learning_rate(1, 1, 0.1, 0, "published") == 0.1
    assert learning_rate(1, 1, 0.1, 0, "short") == pytest.approx(0.05)


def test_a_short_run_takes_the_rates_in_the_middle_of_its_epochs():
    assert [learning_rate(e, 2, 1.0, 0, "short") for e in (1, 2)] == pytest.approx([0.853553, 0.146447], rel=1e-5)
    first, second, *_, last = (learning_rate(e, 4, 1.0, 1, "short") for e in range(1, 5))
    # half way from 0.01 to the cosine's 1 / 2 * (1 + cos(pi / 8)), then the cosine itself
    assert first == pytest.approx((0.961940 + 0.01) / 2, rel=1e-5)
    assert second == pytest.approx(0.691342, rel=1e-5)
    assert last == pytest.approx(0.038060, rel=1e-4)


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 8, 39, 99])
def test_no_epoch_of_a_short_run_is_wasted(epochs):
    warmup = default_warmup(10, epochs)
    rates = [learning_rate(e, epochs, 0.8, warmup, default_schedule(epochs)) for e in range(1, epochs + 1)]
    assert min(rates) > 0 and max(rates) > 0.8 / 4
    assert warmup not in (1, 2) or rates[0] > 0.8 / 8


def test_every_papers_recipe_keeps_the_published_schedule():
    for name in set(names()) - {"masks", "text"}:
        epochs = read(name).settings.get("epochs", 400)
        assert default_schedule(epochs) == "published", name
    assert default_schedule(100) == "published" and default_schedule(99) == "short"


def test_an_unknown_schedule():
    with pytest.raises(ValueError, match="one of published, short, not 'linear'"):
        learning_rate(1, 4, 0.1, 0, "linear")

"""curves.png: what is in it, and that every run that finished an epoch has it."""

from __future__ import annotations

import math
from dataclasses import replace

import matplotlib
import pytest
import torch
from PIL import Image
from runs import interrupt_after, trainer

from auglocal_ext import pictures
from auglocal_ext.training import DivergedError, Interrupted
from auglocal_ext.training.run.curves import Curves, draw_run, read_curves


def curves(epochs, modules):
    time = torch.arange(1, epochs + 1, dtype=torch.float64)
    losses = torch.stack([(k + 1) / time for k in range(modules)], 1)
    accuracies = torch.stack([1 - 1 / (time + k + 1) for k in range(modules)], 1)
    accuracies[:, 0] = math.nan if modules > 2 else accuracies[:, 0]
    own = losses[:, -1]
    return Curves(time, own, 1.1 * own, accuracies[:, -1], 0.9 * accuracies[:, -1], losses.sum(1), losses, accuracies)


@pytest.fixture
def charts(monkeypatch):
    """The axes of the figures that were drawn."""
    made, new_figure = [], pictures.new_figure

    def noted(*arguments, **ratios):
        figure, axes = new_figure(*arguments, **ratios)
        made.append(axes)
        return figure, axes

    monkeypatch.setattr(pictures, "new_figure", noted)
    return made


def lines(axes):
    return [line.get_ydata() for line in axes.get_lines()]


def test_many_modules_are_told_by_colour(tmp_path, charts):
    before = dict(matplotlib.rcParams)
    given = curves(30, 55)
    draw_run(tmp_path / "curves.png", given, "resnet110, auglocal", "epoch 30 of 30")
    assert dict(matplotlib.rcParams) == before
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG" and min(image.size) > 500
    ((loss, accuracy), (local_loss, local_accuracy)) = charts[0]
    for axes, names, unit in ((loss, "loss", 1), (accuracy, "accuracy", 100)):
        expected = [(unit * getattr(given, f"{split}_{names}")).tolist() for split in ("train", "test")]
        assert [list(line) for line in lines(axes)] == expected
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "test"]
    assert [list(line) for line in lines(local_loss)] == given.module_losses.T.tolist()
    assert len(lines(local_accuracy)) == 56  # and the network's on the test images
    assert len({line.get_color() for line in local_loss.get_lines()}) == 55
    assert local_loss.get_legend() is None and len(local_accuracy.get_legend().get_texts()) == 1


def test_backpropagation_and_one_epoch(tmp_path, charts):
    draw_run(tmp_path / "curves.png", curves(1, 1), "resnet32, backpropagation", "epoch 1 of 1")
    assert charts[0].shape == (1, 2)
    loss = charts[0][0, 0]
    assert list(loss.get_xticks()) == [1] and all(line.get_marker() == "o" for line in loss.get_lines())


def test_a_spike_of_the_loss_does_not_press_the_rest_flat(tmp_path, charts):
    given = curves(5, 2)
    draw_run(tmp_path / "plain.png", given, "a", "b")
    given.test_loss[0] = 50.0
    draw_run(tmp_path / "spike.png", given, "a", "b")
    assert [axes[0, 0].get_yscale() for axes in charts] == ["linear", "log"]


@pytest.mark.parametrize("end", ["done", "interrupted", "diverged"])
def test_every_run_that_finished_an_epoch_has_the_picture(config, separable, tmp_path, charts, end):
    settings = config(epochs=3, rule="auglocal", depth=2)
    run = trainer(settings, separable)
    if end == "done":
        run.fit()
    elif end == "interrupted":
        interrupt_after(run, 10)
        with pytest.raises(Interrupted):
            run.fit()
    else:
        step = run._learner.step

        def wreck(*arguments):
            if run._done.epochs == 2:
                for parameter in run.network.parameters():
                    parameter.data.fill_(math.nan)
            return step(*arguments)

        run._learner.step = wreck
        with pytest.raises(DivergedError):
            run.fit()
    with Image.open(tmp_path / "run" / "curves.png") as image:
        image.load()
    epochs = [1, 2, 3] if end == "done" else [1, 2]  # the second was too soon after the first to be drawn at its end
    assert [list(line.get_xdata()) for line in charts[-1][0, 0].get_lines()] == [epochs, epochs]
    assert read_curves(tmp_path / "run").epochs.tolist() == epochs


def test_a_long_run_draws_while_it_goes_on_but_not_after_each_epoch(config, separable, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "auglocal_ext.training.run.trainer.draw_run", lambda path, given, *_: drawn.append(len(given.epochs))
    )
    run = trainer(config(epochs=4), separable)
    run.fit()
    assert drawn == [1, 4]


def test_of_masks_the_miou_takes_the_accuracys_place(tmp_path, charts):
    given = replace(curves(3, 2), train_miou=torch.full((3,), 0.4), test_miou=torch.full((3,), 0.3))
    given = replace(given, module_mious=torch.tensor([[0.1, 0.4]] * 3))
    draw_run(tmp_path / "curves.png", given, "fcn_resnet50, greedy", "epoch 3 of 3")
    (_, accuracy), (_, modules) = charts[0]
    assert accuracy.get_ylabel() == "mIoU, %" and modules.get_ylabel() == "mIoU, training, %"
    assert [list(line) for line in lines(accuracy)] == [pytest.approx([40.0] * 3), pytest.approx([30.0] * 3)]
    assert [line[0] for line in lines(modules)] == [pytest.approx(each) for each in (10.0, 40.0, 30.0)]

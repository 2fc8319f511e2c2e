"""Runs that are interrupted and taken up again are those that were not."""

from __future__ import annotations

import signal
from dataclasses import replace

import pytest
import torch
from runs import RULES, interrupt_after, log, trainer

from auglocal_ext.cli import main
from auglocal_ext.training import CheckpointError, Interrupted


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "after",
    [
        pytest.param(11, id="within epoch 3"),
        pytest.param(8, id="end of epoch 2", marks=pytest.mark.slow),
        pytest.param(9, id="first step of epoch 3", marks=pytest.mark.slow),
    ],
)
def test_resume_is_bit_exact(config, separable, tmp_path, rule, after):
    straight = config(output=str(tmp_path / "straight"), **rule)
    whole = trainer(straight, separable)
    whole.fit()

    settings = config(output=str(tmp_path / "stopped"), **rule)
    first = trainer(settings, separable)
    interrupt_after(first, after)
    with pytest.raises(Interrupted, match=f"in epoch {(after - 1) // 4 + 1} after {(after - 1) % 4 + 1} of 4 steps"):
        first.fit()

    torch.manual_seed(999)  # nothing may depend on what this process drew before
    second = trainer(settings, separable)
    second.resume()
    summary = second.fit()
    for (name, expected), (_, found) in zip(
        whole.network.state_dict().items(), second.network.state_dict().items(), strict=True
    ):
        assert torch.equal(expected, found), name
    assert log(settings) == log(straight)
    assert summary.best_epoch >= 1 and summary.last_accuracy == whole._done.last_accuracy


def test_the_largest_seed_trains_and_resumes(config, separable, capsys):
    assert main(["train", "--dataset", "cifar10", "--seed", str(2**64 - 1), "--config"]) == 0
    assert f"seed = {2**64 - 1}\n" in capsys.readouterr().out
    settings = config(seed=2**64 - 1, mixup=0.2, epochs=1)
    trainer(settings, separable).fit()
    again = trainer(replace(settings, epochs=2), separable)
    again.resume()
    assert again.fit().best_epoch >= 1 and again.config.seed == 2**64 - 1


def test_interrupt_during_evaluation_loses_nothing(config, separable, tmp_path, monkeypatch):
    straight = config(output=str(tmp_path / "straight"))
    trainer(straight, separable).fit()
    settings = config(output=str(tmp_path / "stopped"))
    run = trainer(settings, separable)
    test = run._batches.test

    def interrupted():
        for batch in test():
            signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(run._batches, "test", interrupted)
    with pytest.raises(Interrupted, match="epoch 1 after 4 of 4 steps"):
        run.fit()
    again = trainer(settings, separable)
    again.resume()
    again.fit()
    assert log(settings) == log(straight)


def test_sigint_means_what_it_did_before_and_after(config, separable):
    before = signal.getsignal(signal.SIGINT)
    run = trainer(config(), separable)
    interrupt_after(run, 2)
    with pytest.raises(Interrupted):
        run.fit()
    assert signal.getsignal(signal.SIGINT) is before


def test_second_interrupt_stops_at_once(config, separable):
    run = trainer(config(), separable)
    step = run._learner.step

    def twice(*arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return step(*arguments)

    run._learner.step = twice
    with pytest.raises(KeyboardInterrupt):
        run.fit()


def test_rows_logged_after_the_checkpoint_are_not_repeated(config, separable, tmp_path, monkeypatch):
    """A crash between the log row and the checkpoint."""
    settings = config()
    run = trainer(settings, separable)
    save, calls = run.save, []

    def crash():
        calls.append(None)
        if len(calls) == 3:
            raise OSError("disk is gone")
        save()

    monkeypatch.setattr(run, "save", crash)
    with pytest.raises(OSError, match="disk is gone"):
        run.fit()
    assert len(log(settings)) == 3
    again = trainer(settings, separable)
    again.resume()
    again.fit()
    assert [row["epoch"] for row in log(settings)] == ["1", "2", "3", "4"]


def test_resuming_a_finished_run_trains_nothing(config, separable):
    settings = config(epochs=2)
    summary = trainer(settings, separable).fit()
    again = trainer(settings, separable)
    again.resume()
    assert again.fit() == replace(summary, peak_bytes=again.fit().peak_bytes)
    assert len(log(settings)) == 2
    (again.output / "log.csv").unlink()  # there is nothing to draw then
    (again.output / "curves.png").unlink()
    again.fit()
    assert log(settings) == [] and not (again.output / "curves.png").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lr": 0.07}, "--lr: 0.05 in the checkpoint, now 0.07"),
        ({"rule": "auglocal", "depth": 2}, "--rule: 'bp' in the checkpoint, now 'auglocal'"),
        ({"seed": 1}, "--seed"),
    ],
)
def test_resume_with_other_settings_is_refused(config, separable, change, said):
    run = trainer(config(), separable)
    interrupt_after(run, 1)
    with pytest.raises(Interrupted):
        run.fit()
    with pytest.raises(CheckpointError, match=said):
        trainer(config(**change), separable).resume()


def test_how_steps_are_launched_may_change_on_resume(config, separable):
    rule = {"rule": "auglocal", "depth": 2, "epochs": 2}
    trainer(config(**rule), separable).fit()
    trainer(config(graph="off", overlap=False, **rule), separable).resume()


def test_a_setting_that_the_checkpoint_lacks_had_its_default(config, separable):
    """A version that did not have it wrote the run."""
    settings = config(rule="predsim", modules=2, epochs=1)
    trainer(settings, separable).fit()
    path = f"{settings.output}/checkpoint.pt"
    state = torch.load(path, weights_only=True)
    for name in ("zero_padding", "init", "amp"):
        del state["settings"][name]
    torch.save(state, path)
    for name, before, now in (("zero_padding", False, True), ("init", "'own'", "released"), ("amp", "'none'", "bf16")):
        other = replace(settings, **{name: now})
        with pytest.raises(CheckpointError, match=f"--{name.replace('_', '-')}: {before} in the checkpoint, now"):
            trainer(other, separable).resume()
    trainer(settings, separable).resume()

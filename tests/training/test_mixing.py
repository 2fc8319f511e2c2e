"""Mixup and CutMix: mixtures pixel by pixel, labels that say what is in them, and runs that resume to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from runs import RULES, interrupt_after, log, trainer

from auglocal_ext.training import Interrupted, SettingsError
from auglocal_ext.training.data.mixing import MixedBatches, cut_mix, mix_up, probabilities


class Source:
    """Batches of constant images, whose value is their index; three classes."""

    steps = 4

    def train(self, epoch, first=0):
        for step in range(first, self.steps):
            images = torch.arange(6.0).view(6, 1, 1, 1) + 10 * step + torch.zeros(6, 2, 8, 6)
            yield images.contiguous(memory_format=torch.channels_last), torch.arange(6) % 3

    def test(self):
        yield torch.zeros(6, 2, 8, 6), torch.arange(6) % 3

    def state_dict(self):
        return {"state": torch.tensor(3)}

    def load_state_dict(self, state):
        self.loaded = state


def mixed(**strengths):
    return MixedBatches(Source(), 3, **{"mixup": 0.0, "cutmix": 0.0, "seed": 7, **strengths})


def test_mixup_is_the_sum_of_shares():
    images = torch.randn(5, 3, 4, 4)
    found, share = mix_up(images, 0.3, np.random.default_rng(0))
    assert share == 0.3
    for i in range(5):
        torch.testing.assert_close(found[i], 0.3 * images[i] + 0.7 * images[i - 1])


@pytest.mark.parametrize("share", [0.0, 0.25, 0.7, 0.999])
def test_cutmix_pastes_a_rectangle(share):
    images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 9, 7).contiguous()
    random = np.random.default_rng(1)
    for _ in range(50):
        found, kept = cut_mix(images, share, random)
        own = found[2, 0] == 2
        assert bool(((found[2, 0] == 1) | own).all()) and kept == pytest.approx(float(own.float().mean()))
        rows, columns = (~own).any(1).nonzero(), (~own).any(0).nonzero()
        if len(rows):  # a rectangle, of the same place in every image
            assert bool((~own)[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all())
        assert torch.equal(found[1, 0] == 1, own)
        assert kept >= share - 1e-6  # cut at the edges the rectangle is smaller, never larger
    assert not torch.equal(images[1], found[1]) or share > 0.9


def test_labels_are_probabilities_of_what_was_mixed():
    found = probabilities(torch.tensor([0, 2, 2]), 0.75, 4)
    assert found.tolist() == [[0.75, 0, 0.25, 0], [0.25, 0, 0.75, 0], [0, 0, 1, 0]] and found.dtype == torch.float32


@pytest.mark.parametrize("strengths", [{"mixup": 0.2}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_batches(strengths):
    source = mixed(**strengths)
    assert source.steps == 4
    first = list(source.train(2))
    assert len(first) == 4
    for images, labels in first:
        assert images.shape == (6, 2, 8, 6) and images.is_contiguous(memory_format=torch.channels_last)
        assert labels.shape == (6, 3) and bool((labels >= 0).all())
        torch.testing.assert_close(labels.sum(1), torch.ones(6))
    for again, (images, labels) in zip(source.train(2, first=2), first[2:], strict=True):
        assert torch.equal(again[0], images) and torch.equal(again[1], labels)
    other = next(iter(source.train(3)))
    assert not torch.equal(other[1], first[0][1])
    # Images of mixup are blends of whole numbers, those of CutMix are made of them.
    kinds = {bool((images % 1 != 0).any()) for epoch in range(8) for images, _ in source.train(epoch)}
    assert (True in kinds) == ("mixup" in strengths)  # False too, where a share of 0.2 is all but 0 or 1
    assert (False in kinds) or "cutmix" not in strengths
    images, labels = next(source.test())
    assert labels.dtype == torch.int64
    assert source.state_dict() == {"state": torch.tensor(3)}
    source.load_state_dict({"a": 1})


def test_shares_follow_the_beta_distribution():
    class Many(Source):
        steps = 3000

    shares = [float(labels[0, 0]) for _, labels in MixedBatches(Many(), 3, mixup=0.5, cutmix=0.0, seed=0).train(1)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(1 / (4 * 2), abs=0.01)  # of Beta(a, a): 1 / (4 (2 a + 1))


@pytest.mark.parametrize(
    "rule", [r if r.id == "auglocal" else pytest.param(*r.values, id=r.id, marks=pytest.mark.slow) for r in RULES]
)
def test_a_run_learns_and_resumes_in_the_middle_of_an_epoch(config, separable, tmp_path, rule):
    mixes = {"mixup": 0.2, "cutmix": 0.5, "epochs": 10, "lr": 0.1, "recipe": "stl10"}
    straight = config(output=str(tmp_path / "straight"), **mixes, **rule)
    run = trainer(straight, separable)
    summary = run.fit()
    assert summary.last_accuracy > 0.6  # chance is a third
    settings = config(**mixes, **rule)
    first = trainer(settings, separable)
    interrupt_after(first, 6)
    with pytest.raises(Interrupted):
        first.fit()
    again = trainer(settings, separable)
    again.resume()
    again.fit()
    assert log(settings) == log(straight)
    for ours, theirs in zip(again.network.parameters(), run.network.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "rule",
    [
        {"rule": "predsim"},
        {"rule": "infopro", "modules": 3, "loss": "contrast", "weights": (1.0, 1.0, 1.0, 1.0)},
        {"rule": "man", "head": "predsim"},
    ],
    ids=lambda rule: rule["rule"],
)
def test_rules_that_compare_samples_by_class_refuse_mixtures_before_training(config, separable, rule):
    with pytest.raises(
        SettingsError, match="--mixup and --cutmix make class probabilities of labels: .* class indices"
    ):
        trainer(config(mixup=0.2, **rule), separable)
    trainer(config(mixup=0.0, **rule), separable)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"mixup": -0.1}, "--mixup must be at least 0, got -0.1"),
        ({"cutmix": float("inf")}, "--cutmix must be finite, got inf"),
        ({"cutmix": float("nan")}, "--cutmix must be finite, got nan"),
    ],
)
def test_strengths_that_cannot_be(config, settings, said):
    with pytest.raises(SettingsError, match=said):
        config(**settings)

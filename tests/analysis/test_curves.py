"""Curves come out of the log as they went in; scores are those of a loop over the local modules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from auglocal_ext import MAN, AugLocal, ContSup, Greedy, InfoPro, LocalSequential, PredSim, models
from auglocal_ext.analysis import module_scores, read_curves
from auglocal_ext.training import CheckpointError
from auglocal_ext.training.run.logs import CsvLog, EpochRow

RULES = [
    pytest.param(AugLocal(depth=2), id="auglocal"),
    pytest.param(ContSup("R1E"), id="contsup"),
    pytest.param(ContSup("E", head=AugLocal(depth=2)), id="rule as head"),
    pytest.param(InfoPro((5.0, 0.05), (0.2, 0.5)), id="infopro"),
    pytest.param(InfoPro((1.0, 1.0), (1.0, 1.0), loss="contrast"), id="contrast"),
    pytest.param(PredSim(), id="predsim"),
    pytest.param(MAN(), id="man"),
    pytest.param(Greedy(), id="greedy"),
]


def row(epoch):
    losses = (2.0 / epoch, 1.0 / epoch)
    return EpochRow(
        epoch, 0.1, 1.0 / epoch, 0.3, 3.0 / epoch, 2.0, 0.1 * epoch, 1e3, 3.5, 0.02, 9, losses, (math.nan, 0.3)
    )


def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 3, 16, 16, generator=generator), torch.randint(0, 10, (n,), generator=generator))
        for n in (6, 6, 3)
    ]


def trained(rule):
    """A network whose BatchNorm statistics are not those it started with."""
    net = LocalSequential(models.resnet8(width=4), rule, 10, (3, 16, 16))
    with torch.no_grad():
        for images, labels in batches():
            net(images + 0.5, labels)
    return net


def test_the_log_comes_back(tmp_path):
    log = CsvLog(tmp_path / "log.csv", 0)
    for epoch in (1, 2, 3):
        log.add(row(epoch))
    with log.path.open("a") as file:
        file.write("4,0.1,1.0,0.3,3.0,2.0,0.4,1000.0,3.5,0.02,9,2.0 1.0,nan 0.")  # written this very moment
    curves = read_curves(tmp_path)
    assert curves.epochs.tolist() == [1, 2, 3]
    assert curves.local_loss_sum.tolist() == [3.0, 1.5, 1.0]
    assert curves.train_loss.tolist() == [1 / epoch for epoch in (1, 2, 3)]
    assert curves.test_accuracy.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert curves.test_loss.shape == curves.train_accuracy.shape == (3,)
    assert curves.module_losses.tolist() == [[2 / epoch, 1 / epoch] for epoch in (1, 2, 3)]
    assert curves.module_losses.dtype == torch.float64
    assert curves.module_accuracies[:, 0].isnan().all() and curves.module_accuracies[:, 1].tolist() == [0.3] * 3


def test_what_is_no_log(tmp_path):
    with pytest.raises(CheckpointError, match="log.csv: no such file; expected the folder of a run"):
        read_curves(tmp_path)
    CsvLog(tmp_path / "log.csv", 0)
    with pytest.raises(CheckpointError, match="no finished epoch yet"):
        read_curves(tmp_path)
    (tmp_path / "log.csv").write_text("epoch,lr,module_losses\n1,0.1,2.0\n")
    with pytest.raises(CheckpointError, match="no column train_loss, .*, module_accuracies: another version"):
        read_curves(tmp_path)
    (tmp_path / "log.csv").write_text("")
    with pytest.raises(CheckpointError, match="no finished epoch yet"):
        read_curves(tmp_path)


@pytest.mark.parametrize("rule", RULES)
def test_scores_are_those_of_a_loop_over_the_modules(rule):
    net = trained(rule).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    scores = module_scores(net, iter(batches()))
    assert net.training and all(part.training for part in net.auxiliary)
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name]), name

    net.eval()
    images = sum(len(y) for _, y in batches())
    for score, module in zip(scores, net.local_modules, strict=True):
        assert score.index == module.index
        loss, hits = 0.0, 0
        with torch.no_grad():
            for x, y in batches():
                h, history = x, []
                for earlier in net.local_modules[: module.index + 1]:
                    h = earlier(h, history)
                loss += float(module.local_loss(h, y, x)) * len(y) / images
                if module.auxiliary is None:
                    hits += int((h.argmax(1) == y).sum())
                elif module.auxiliary.settings.task is net.task:
                    hits += int((module.auxiliary(h).argmax(1) == y).sum())
        assert score.loss == pytest.approx(loss, rel=1e-5)
        classifies = module.auxiliary is None or module.auxiliary.settings.task is net.task
        assert score.accuracy == pytest.approx(hits / images) if classifies else math.isnan(score.accuracy)
        children = net.primary.named_children()
        assert list(score.layers) == [name for name, child in children if any(child is c for c in module.layers)]


def test_backpropagation_is_one_module():
    net = models.resnet8(width=4)
    (score,) = module_scores(net, batches())
    assert score.layers == ("stem", "layer1_0", "layer2_0", "layer3_0", "classifier")
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    with torch.no_grad():
        logits = net.eval()(x)
    assert score.loss == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    assert score.accuracy == pytest.approx(float((logits.argmax(1) == y).double().mean()))


def test_nothing_to_look_at():
    with pytest.raises(ValueError, match="no batches"):
        module_scores(models.resnet8(width=4), [])

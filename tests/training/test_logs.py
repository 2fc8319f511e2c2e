"""The log files and the progress bar."""

from __future__ import annotations

import io
import math
import re
import sys
import time

import pytest
import torch

from auglocal_ext.training import Trainer
from auglocal_ext.training.logs import CsvLog, EpochRow, TensorBoardLog, peak_bytes


def row(epoch):
    return EpochRow(epoch, 0.1, 2.5, 0.25, 2.0, 0.5, 1000.0, 3.5, 0.02, 10**9, (1.5, 1.0), (math.nan, 0.25))


def test_csv(tmp_path):
    path = tmp_path / "log.csv"
    CsvLog(path, 0).add(row(1))
    assert path.read_text().splitlines() == [
        "epoch,lr,train_loss,train_accuracy,test_loss,test_accuracy,images_per_second,seconds,waiting,peak_bytes,"
        "module_losses,module_accuracies",
        "1,0.1,2.5,0.25,2.0,0.5,1000.0,3.5,0.02,1000000000,1.5 1.0,nan 0.25",
    ]


def test_csv_goes_on_after_the_epoch_of_the_checkpoint(tmp_path):
    path = tmp_path / "log.csv"
    log = CsvLog(path, 0)
    for epoch in (1, 2, 3):
        log.add(row(epoch))
    with path.open("a") as file:
        file.write("4,0.1,2.")  # cut short
    log = CsvLog(path, 2)
    log.add(row(3))
    assert [line.split(",")[0] for line in path.read_text().splitlines()] == ["epoch", "1", "2", "3"]


def test_a_new_run_starts_a_new_table(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("epoch\n7\n")
    CsvLog(path, 0)
    assert len(path.read_text().splitlines()) == 1


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    board = TensorBoardLog(tmp_path, 0)
    assert board.note is None
    board.add(row(1))
    board.close()
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert {
        "train/loss",
        "train/accuracy",
        "test/accuracy",
        "lr",
        "module_loss/1",
        "module_accuracy/1",
        "images_per_second",
        "waiting",
    } <= set(tags)
    assert events.Scalars("module_loss/0")[0].value == 1.5
    assert events.Scalars("module_accuracy/1")[0].value == 0.25
    assert "module_accuracy/0" not in tags  # a module that does not classify


def test_without_tensorboard_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    board = TensorBoardLog(tmp_path / "board", 0)
    assert "no TensorBoard log" in board.note and "\n" not in board.note
    board.add(row(1))
    board.close()
    assert not (tmp_path / "board").exists()


def test_peak_is_of_this_process():
    assert 10**7 < peak_bytes(torch.device("cpu")) < 10**12


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_bar_tells_loss_accuracy_rate_and_peak(config, separable, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    run = Trainer(config(epochs=1), separable, say=lambda line: None)
    step = run._learner.step
    run._learner.step = lambda *arguments: (time.sleep(0.12), step(*arguments))[1]  # tqdm draws every 0.1 s
    run.fit()
    shown = sys.stderr.getvalue()
    for part in ("epoch 1/1", "loss ", "accuracy ", "peak ", "image/s", "test"):
        assert part in shown, part


def test_no_bar_where_there_is_no_terminal(config, separable, capsys):
    Trainer(config(epochs=1), separable).fit()
    captured = capsys.readouterr()
    assert "image/s" not in captured.err
    assert "epoch 1/1" in captured.out and "images/s" in captured.out
    assert re.search(r"waiting for data \d+\.\d%  peak", captured.out)

"""The log files and the progress bar."""

from __future__ import annotations

import io
import math
import re
import sys
import threading
import time

import pytest
import torch

from auglocal_ext.training import CheckpointError, Trainer
from auglocal_ext.training.run.logs import CsvLog, EpochRow, EpochTable, TensorBoardLog, peak_bytes
from auglocal_ext.training.run.measures import ACCURACY


def row(epoch):
    return EpochRow(epoch, 0.1, 1.0, 0.25, 2.5, 2.0, 0.5, 1000.0, 3.5, 0.02, 10**9, (1.5, 1.0), (math.nan, 0.25))


def test_csv(tmp_path):
    path = tmp_path / "log.csv"
    CsvLog(path, 0).add(row(1))
    assert path.read_text().splitlines() == [
        "epoch,lr,train_loss,train_accuracy,local_loss_sum,test_loss,test_accuracy,images_per_second,seconds,waiting,"
        "peak_bytes,module_losses,module_accuracies",
        "1,0.1,1.0,0.25,2.5,2.0,0.5,1000.0,3.5,0.02,1000000000,1.5 1.0,nan 0.25",
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


def test_a_log_of_other_columns_is_not_gone_on_with(tmp_path):
    path = tmp_path / "log.csv"
    old = "epoch,lr,train_loss,train_accuracy,test_loss,test_accuracy\n1,0.1,22,0.25,2.0,0.5\n"
    path.write_text(old)
    with pytest.raises(CheckpointError, match="log.csv: its columns are epoch, lr.* expected .*local_loss_sum"):
        CsvLog(path, 1)
    assert path.read_text() == old


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
        "local_loss_sum",
        "lr",
        "module_loss/1",
        "module_accuracy/1",
        "images_per_second",
        "waiting",
    } <= set(tags)
    assert events.Scalars("train/loss")[0].value == 1.0 and events.Scalars("local_loss_sum")[0].value == 2.5
    assert events.Scalars("module_loss/0")[0].value == 1.5
    assert events.Scalars("module_accuracy/1")[0].value == 0.25
    assert "module_accuracy/0" not in tags  # a module that does not classify


def test_tensorboard_on_a_full_disk_is_one_line(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    resource = pytest.importorskip("resource")
    printed = []
    monkeypatch.setattr(threading, "excepthook", printed.append)
    before, threads = resource.getrlimit(resource.RLIMIT_FSIZE), threading.active_count()
    board = TensorBoardLog(tmp_path, 0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
    try:
        board.add(row(1))
        full = TensorBoardLog(tmp_path / "full", 0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, before[1]))
        none = TensorBoardLog(tmp_path / "none", 0)
        full.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert board.note == f"no TensorBoard log: {tmp_path} cannot be written: File too large"
    assert full.note is None and none.note.endswith("none cannot be written: File too large")
    assert not printed and threading.active_count() == threads


def test_without_tensorboard_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    board = TensorBoardLog(tmp_path / "board", 0)
    assert re.fullmatch(r"no TensorBoard log \(.*\): pip install tensorboard", board.note)
    board.add(row(1))
    board.close()
    assert not (tmp_path / "board").exists()


def test_peak_is_of_this_process():
    assert 10**7 < peak_bytes(torch.device("cpu")) < 10**12


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(config, data, monkeypatch, columns):
    """What a terminal of that width shows of a run of two epochs: the states of its bars."""
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (columns, 24))
    run = Trainer(config(epochs=2), data, say=lambda line: None)
    step = run._learner.step
    run._learner.step = lambda *arguments: (time.sleep(0.12), step(*arguments))[1]  # tqdm draws every 0.1 s
    run.fit()
    return sys.stderr.getvalue().split("\r")


def test_progress_bar_tells_rate_time_left_loss_accuracy_and_peak(config, separable, monkeypatch):
    states = shown(config, separable, monkeypatch, 140)
    time_left = r"[\d.]+k? images/s, 00:0\d left, run 00:0\d"
    pattern = rf"epoch 1/2 \|.+\| {time_left}, loss \d+\.\d{{3}}, accuracy \d+\.\d%, peak [\d,]+ MB$"
    assert any(re.search(pattern, state.rstrip()) for state in states), states
    assert any(state.startswith("test |") for state in states)


def test_progress_bar_fits_80_columns(config, separable, monkeypatch):
    states = shown(config, separable, monkeypatch, 80)
    assert max(len(state) for state in states) <= 80
    assert any(re.search(r"left, run 00:0\d, loss \d+\.\d{3}, \d+\.\d%$", state.rstrip()) for state in states), states


def test_no_bar_where_there_is_no_terminal(config, separable, capsys):
    Trainer(config(epochs=1), separable).fit()
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "1/1" in captured.out and "images/s" in captured.out


def test_epochs_are_a_table_of_80_columns():
    table = EpochTable(400, ACCURACY, 2)
    heading, line = table.heading().splitlines(), table.line(row(12))
    assert max(len(text) for text in (*heading, line)) == len(line) == 79
    assert heading[1].split() == "epoch lr loss accuracy losses loss accuracy images/s".split()
    assert line.split() == ["12/400", "0.1", "1.0000", "25.00%", "2.5000", "2.0000", "50.00%", "1,000"]
    assert "sum of local" in heading[0]
    # one loss is no sum
    assert "losses" not in EpochTable(400, ACCURACY, 1).heading() and "2.5" not in EpochTable(4, ACCURACY, 1).line(
        row(1)
    )

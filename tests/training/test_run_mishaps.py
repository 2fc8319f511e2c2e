"""What can happen to a run and its folder: damage, a full disk, a second process, signals. One line says what."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from runs import interrupt_after, log, trainer

from auglocal_ext.cli import main
from auglocal_ext.training import CheckpointError, Interrupted, SettingsError, load_run
from auglocal_ext.training.config.schedule import learning_rate
from auglocal_ext.training.errors import OutputError, WorkerError
from auglocal_ext.training.run import checkpoint
from auglocal_ext.training.run.local_learner import LocalLearner
from auglocal_ext.training.run.run_lock import RunLock, refuse_used


@pytest.fixture
def stopped(config, separable):
    """A run stopped in the middle of its second epoch."""
    settings = config(rule="auglocal", depth=2)
    run = trainer(settings, separable)
    interrupt_after(run, 6)
    with pytest.raises(Interrupted):
        run.fit()
    return settings


def changed(settings, at, value):
    """Writes another value into the checkpoint; what the others are by."""
    path = f"{settings.output}/checkpoint.pt"
    state = torch.load(path, weights_only=True)
    inner = state
    for key in at[:-1]:
        inner = inner[key]
    if value is None:
        del inner[at[-1]]
    else:
        inner[at[-1]] = value
    torch.save(state, path)


DAMAGE = [
    (("settings",), {}, "as settings, found {}"),
    (("settings", "lr"), "fast", "its settings cannot be used|in the checkpoint, now"),
    (("settings", "width"), torch.zeros(3), "expected settings"),
    (("data", "classes"), 3, "expected a list of names as data.classes, found 3"),
    (("data", "input_shape"), [3, 16], "expected three sizes as data.input_shape"),
    (("data", "in_memory"), torch.zeros(2), "its facts about the images cannot be used"),
    (("progress", "best_miou"), "high", "expected a number or none as progress.best_miou, found 'high'"),
    (("progress", "epochs"), None, "expected a whole number as progress.epochs, found nothing"),
    (("progress", "epochs"), 10**30, "is in epoch"),
    (("progress", "strange"), 1, "its progress cannot be used"),
    (("epoch_sums", "sums"), torch.zeros(3, dtype=torch.float64), "an epoch has 4 steps of 3 local modules"),
    (("epoch_sums", "steps"), 77, "an epoch has 4 steps"),
    (("batches",), {}, "its progress cannot be used"),
    (("random", "cpu"), torch.zeros(3), "its progress cannot be used"),
    (("random",), [], "expected states of generators as random"),
    (("network", "primary.layer1_0.bn1.weight"), torch.zeros(4, dtype=torch.int64), "tensor of torch.float32, found"),
    (("network", "primary.layer1_0.bn1.weight"), torch.full((4,), torch.nan), "bn1.weight is not finite"),
    (("learner", "optimizer", "state", 0, "momentum_buffer"), torch.zeros(1), "state of its optimizer is not that of"),
    (("learner", "optimizer", "state", 999), {"momentum_buffer": torch.zeros(1)}, "state of its optimizer is not"),
    (("learner", "optimizer", "param_groups", 0, "momentum"), 0.5, "its optimizer has .*'momentum': 0.5"),
    (("learner", "grad_scaler"), {"scale": 1.0}, "its loss scaler"),
    (("learner",), None, "expected values by name as learner"),
]


def test_whatever_a_checkpoint_holds_is_one_error(stopped, separable):
    path = f"{stopped.output}/checkpoint.pt"
    shutil.copy(path, f"{path}.whole")
    run, whole = trainer(stopped, separable), trainer(stopped, separable)
    for at, value, said in DAMAGE:
        shutil.copy(f"{path}.whole", path)
        changed(stopped, at, value)
        with pytest.raises(CheckpointError, match=f"(?s)checkpoint.pt.*({said})"):
            run.resume()
        if at[0] in ("network", "data") and value is not None and at[-1] != "in_memory":
            with pytest.raises(CheckpointError, match="checkpoint.pt"):
                load_run(stopped.output, "cpu")
    shutil.copy(f"{path}.whole", path)
    whole.resume()


def test_a_damaged_checkpoint_is_one_line_at_the_terminal(stopped, capsys):
    path = f"{stopped.output}/checkpoint.pt"
    with open(path, "r+b") as file:
        file.truncate(5000)
    assert main(["train", "--output", stopped.output, "--resume"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}: not a readable checkpoint")


def test_a_damaged_log_is_named_with_its_line(stopped, separable):
    path = f"{stopped.output}/log.csv"
    with open(path) as file:
        whole = file.read()
    last = whole.splitlines()[-1]
    run = trainer(stopped, separable)
    run.resume()
    for row, said in (
        ("1,2,3\n", "line 3: damaged .expected 13 columns, found 3"),
        (f"{last}\n", "line 3: damaged .epoch 1 after 1"),
        (f"x{last}\n", "line 3: damaged .could not convert string to float"),
        ("\0\n", "line 3: damaged"),
        (f"{last} 5.0\n", "line 3: damaged .expected 3 numbers as module_accuracies, found 4"),
        ("\udcff\n", "line 1: damaged .'utf-8' codec"),
    ):
        with open(path, "w", errors="surrogateescape") as file:
            file.write(whole + row)
        with pytest.raises(CheckpointError, match=f"log.csv, {said}.*move it away to go on"):
            run.fit()
    os.unlink(path)
    run.fit()
    assert [row["epoch"] for row in log(stopped)] == ["2", "3", "4"]


def test_more_epochs_lay_the_schedule_anew(stopped, config, separable):
    longer = config(rule="auglocal", depth=2, epochs=6)
    run = trainer(longer, separable)
    run.resume()
    assert run.extension == (
        "6 epochs in place of 4: the schedule is laid anew over all of them; epoch 2 has the rate 0.0427"
    )
    run.fit()
    rates = [float(row["lr"]) for row in log(longer)]
    expected = [learning_rate(1, 4, 0.05, 1, "short")]
    assert rates == expected + [learning_rate(epoch, 6, 0.05, 1, "short") for epoch in range(2, 7)]
    again = trainer(longer, separable)
    again.resume()
    assert again.extension is None
    fewer = trainer(config(rule="auglocal", depth=2, epochs=5), separable)
    with pytest.raises(CheckpointError, match="is in epoch 6: --epochs 5 is less than that"):
        fewer.resume()


def test_a_longer_run_keeps_warm_up_and_form_of_the_schedule(config, separable):
    """Those that go with the new number of epochs are another run's."""
    settings = {"recipe": "cifar10", "lr": 0.05}  # has a warm-up
    run = trainer(config(epochs=8, **settings), separable)
    interrupt_after(run, 1)
    with pytest.raises(Interrupted):
        run.fit()
    longer = trainer(config(epochs=120, **settings), separable)
    assert (longer.config.warmup, longer.config.schedule) == (10, "published")
    longer.resume()
    assert (longer.config.epochs, longer.config.warmup, longer.config.schedule) == (120, 2, "short")
    with pytest.raises(CheckpointError, match="--warmup: 2 in the checkpoint, now 10"):
        trainer(config(epochs=120, warmup=10, **settings), separable).resume()


def test_two_processes_cannot_write_in_one_folder(stopped, separable):
    code = (  # as the lock does it; importing torch takes seconds
        "import fcntl, os, sys\n"
        "handle = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "os.write(handle, f'process {os.getpid()} on a host'.encode())\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-S", "-c", code, f"{stopped.output}/.lock"]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "locked\n"
        run = trainer(stopped, separable)
        run.resume()
        used = f"run is in use by process {other.pid} on .*: wait for it, stop it, or choose another --output"
        with pytest.raises(SettingsError, match=used):
            run.fit()
        with pytest.raises(SettingsError, match=used):
            refuse_used(run.output)
    finally:
        other.kill()
        other.communicate()
    run.fit()  # it was held by the process, not by the file that it has left
    assert not (run.output / ".lock").exists()


def test_a_lock_is_not_entered_twice_in_a_process(tmp_path):
    with RunLock(tmp_path / "run"):
        with pytest.raises(SettingsError, match="in use by this process"), RunLock(tmp_path / "run"):
            pass
    with RunLock(tmp_path / "run"):
        pass


def test_a_run_that_another_process_went_on_with_is_not_taken_back(stopped, separable):
    first, second = trainer(stopped, separable), trainer(stopped, separable)
    first.resume()
    second.resume()
    second.fit()
    with pytest.raises(CheckpointError, match="another process went on with this run; resume it again"):
        first.fit()


def test_sigterm_saves_as_ctrl_c_does(config, separable):
    run = trainer(config(), separable)
    step, before = run._learner.step, signal.getsignal(signal.SIGTERM)

    def twice(*arguments):
        for _ in range(2):  # a scheduler sends it to all processes, and torchrun sends its own on
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    run._learner.step = twice
    with pytest.raises(Interrupted, match="stopped in epoch 1 after 1 of 4 steps") as stopped:
        run.fit()
    assert stopped.value.signal == signal.SIGTERM and signal.getsignal(signal.SIGTERM) is before
    again = trainer(config(), separable)
    again.resume()
    again.fit()


def test_sigterm_at_the_terminal(image_folder, tmp_path, capsys, monkeypatch):
    plain = LocalLearner.step

    def step(self, *arguments):
        signal.raise_signal(signal.SIGTERM)
        return plain(self, *arguments)

    monkeypatch.setattr(LocalLearner, "step", step)
    data, output = str(image_folder()), str(tmp_path / "run")
    command = ["train", "--data", data, "--output", output, "--network", "resnet8", "--width", "4", "--depth", "2"]
    assert main([*command, "--batch-size", "8", "--epochs", "2", "--device", "cpu", "--workers", "0"]) == 143
    said = capsys.readouterr().err
    assert "stopped in epoch 1 after 1 of 2 steps; saved" in said and f"train --output {output} --resume" in said


def test_a_signal_that_also_ends_the_workers_still_saves(config, separable, monkeypatch):
    """A scheduler sends it to all processes of a job."""
    run = trainer(config(), separable)
    plain = run._batches.train

    def ended(epoch, first=0):
        for number, batch in enumerate(plain(epoch, first)):
            if number == 2:
                signal.raise_signal(signal.SIGTERM)
                raise WorkerError("a process that reads images was killed")
            yield batch

    run._batches.train = ended
    with pytest.raises(Interrupted, match="stopped in epoch 1 after 2 of 4 steps"):
        run.fit()

    def killed(epoch, first=0):
        raise WorkerError("a process that reads images was killed")
        yield

    again = trainer(config(), separable)
    again.resume()
    monkeypatch.setattr(again._batches, "train", killed)
    with pytest.raises(WorkerError):  # without a signal to this process
        again.fit()


def test_what_killed_runs_left_is_removed_and_modes_are_alike(stopped, separable):
    left = ["checkpoint.pt.partial", "checkpoint.ptx7_.partial", "log.partial"]
    for name in left:
        with open(f"{stopped.output}/{name}", "w") as file:
            file.write("half")
    os.mkdir(f"{stopped.output}/.checkpoint.partial")
    run = trainer(stopped, separable)
    run.resume()
    before = os.umask(0o027)
    try:
        run.fit()
    finally:
        os.umask(before)
    files = [path for path in run.output.iterdir() if path.is_file()]
    assert not [path.name for path in run.output.iterdir() if path.name.endswith((".partial", ".lock"))]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files if path.suffix != ".png"} == {0o640}


@contextmanager
def full_disk(monkeypatch, after=0):
    """No more than so many files reach the disk."""
    done, plain = 0, os.fsync

    def fsync(handle):
        nonlocal done
        done += 1
        if done > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(stopped, separable, monkeypatch):
    run = trainer(stopped, separable)
    run.resume()
    file = run.output / "checkpoint.pt"
    before = file.read_bytes()
    with full_disk(monkeypatch, after=4), pytest.raises(OutputError) as refused:  # config.json, log.csv and the folder
        run.fit()
    assert str(refused.value) == (
        f"{file} cannot be written: No space left on device ({file} holds the run after 2 of 4 steps of epoch 2)"
    )
    assert file.read_bytes() == before and not list(run.output.glob("*.partial"))
    again = trainer(stopped, separable)
    again.resume()
    again.fit()
    assert [row["epoch"] for row in log(stopped)] == ["1", "2", "3", "4"]


def test_torchs_own_error_over_that_of_a_full_disk(tmp_path, monkeypatch):
    """It raises that it is at another place in the file than it thought."""
    import builtins

    plain = builtins.open

    class Full:
        def __init__(self, file):
            self._file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def __getattr__(self, name):
            return getattr(self._file, name)

        def write(self, data):
            if self._file.tell() + len(data) > 3000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self._file.write(data)

    monkeypatch.setattr(builtins, "open", lambda path, mode="r", *a: Full(plain(path, mode, *a)))
    with pytest.raises(OutputError, match=r"checkpoint.pt cannot be written: No space left on device$"):
        checkpoint.save({"weights": torch.zeros(10_000)}, tmp_path / "checkpoint.pt")
    assert not list(tmp_path.iterdir())


def test_pictures_that_cannot_be_drawn_lose_no_run(config, separable, monkeypatch):
    said = []

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("auglocal_ext.training.run.trainer.draw_run", full)
    run = trainer(config(epochs=1), separable)
    run._say = said.append
    run.fit()
    assert any(line.endswith("curves.png cannot be written: No space left on device") for line in said)

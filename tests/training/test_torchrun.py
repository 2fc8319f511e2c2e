"""``torchrun ... -m auglocal_ext train``: several processes train what one does, and outlive each other's end.

torchrun itself starts a few of them, ``torchrun=True``: a plain run, and what concerns its signals and its restarts.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from launched import launch

from auglocal_ext.cli import main
from auglocal_ext.training import CheckpointError, SettingsError, load_run
from auglocal_ext.training.run import checkpoint
from auglocal_ext.training.run.local_learner import LocalLearner
from auglocal_ext.training.run.processes import Launch, SharedStop
from auglocal_ext.training.run.run_lock import RunLock

ROOT = Path(__file__).resolve().parents[2]
RUN = ["--network", "resnet8", "--width", "4", "--batch-size", "8", "--lr", "0.05", "--epochs", "3", "--device", "cpu"]
AUGLOCAL = ["--depth", "2"]
TIMES = ("images_per_second", "seconds", "waiting", "peak_bytes")


@pytest.fixture(scope="module")
def images(tmp_path_factory, make_images):
    return make_images(tmp_path_factory.mktemp("data") / "images", train=10)


def run(folder, images, name, size, *arguments, mishap=None, restarts=0, resume=False, rule=AUGLOCAL, torchrun=False):
    """A run of 20 images, in batches of 8, 8 and 4: its folder and the finished process.

    One process is this one. Several are forked, or started by torchrun itself.
    """
    output = folder / name
    common = ["train", "--output", str(output)]
    common += ["--resume"] if resume else ["--data", str(images), *RUN, *rule]
    common += arguments
    if size == 1 and mishap is None:
        return output, subprocess.CompletedProcess(common, main(common), stderr="see above")
    if not torchrun:
        return output, launch(size, common, mishap, restarts)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(size), "--max-restarts", str(restarts)]
    module = ["-m", "auglocal_ext"] if mishap is None else [str(Path(__file__).with_name("mishap.py"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MISHAP": mishap or ""}
    done = subprocess.run(
        [*command, *module, *common], env=environment, cwd=folder, capture_output=True, text=True, timeout=240
    )
    return output, done


@pytest.fixture
def train(tmp_path, images, one_thread):
    return partial(run, tmp_path, images)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, images):
    """The folder of a run in so many stages and replicas to which nothing happens. Tests share and only read it."""

    @cache
    def of(stages=1, replicas=1):
        size = stages * replicas
        grid = ["--stages", str(stages), "--replicas", str(replicas)] if size > 1 else []
        return trained(partial(run, tmp_path_factory.mktemp("undisturbed"), images), "run", size, *grid)

    return of


def trained(train, *arguments, **options):
    output, done = train(*arguments, **options)
    assert done.returncode == 0, done.stderr
    return output


def weights(output):
    return load_run(output, "cpu").network.state_dict()


def assert_equal(output, expected, exactly=True):
    found = weights(output)
    for name, tensor in weights(expected).items():
        if exactly:
            assert torch.equal(found[name], tensor), name
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def rows(output):
    with (output / "log.csv").open(newline="") as file:
        found = [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]
    for row in found:  # a sum of fp32 numbers, over stages in another order
        row["local_loss_sum"] = pytest.approx(float(row["local_loss_sum"]), rel=1e-6)
    return found


@pytest.mark.slow
def test_two_stages_train_what_one_process_does(train, undisturbed, capsys):
    one = undisturbed()
    output, done = train("two", 2, "--stages", "2", torchrun=True)
    assert done.returncode == 0, done.stderr
    assert_equal(output, one)
    assert rows(output) == rows(one)
    said = done.stdout
    assert said.count("images/s") == 1 and said.count(" 1/3 ") == 1, "one process prints"
    assert "2, 2 stages of 1 replica, on gloo" in said
    assert "waiting  sending  averaging" in said
    assert (output / "schedule.png").stat().st_size > 1000
    settings = json.loads((output / "config.json").read_text())["settings"]
    assert settings["stages"] == 2 and settings["replicas"] == 1
    # One process goes on with it, and replaces the checkpoint by its own.
    assert main(["train", "--output", str(output), "--resume"]) == 0
    assert "resumes after epoch 3" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule",
    [
        ["--rule", "contsup", "--context", "R1E"],
        ["--rule", "predsim"],
        ["--rule", "dgl", "--mixup", "0.2", "--cutmix", "1"],
        ["--depth", "2", "--image-size", "16", "--workers", "1"],
    ],
    ids=["contsup", "predsim", "mixed", "streamed"],
)
def test_stages_of_other_rules_and_data(train, rule):
    one = trained(train, "one", 1, rule=rule)
    two = trained(train, "two", 2, "--stages", "2", "--stage-cuts", "2", rule=rule)
    assert_equal(two, one)
    assert rows(two) == rows(one)


@pytest.mark.slow
# At a tenth of the rate, where rounding grows less: DGL's heads normalise over the few images of a batch.
@pytest.mark.parametrize(
    "rule", [AUGLOCAL, ["--rule", "dgl", "--mixup", "0.2", "--lr", "0.005"]], ids=["auglocal", "mixed"]
)
@pytest.mark.parametrize("grid", [(1, 2), (2, 2), (2, 2, "--shard")], ids=str)
def test_synchronised_replicas_train_what_one_process_does(train, undisturbed, grid, rule):
    """Up to the order in which numbers are added, which a network in training amplifies."""
    stages, replicas, *flags = grid
    one = undisturbed() if rule is AUGLOCAL else trained(train, "one", 1, rule=rule)
    arguments = ["--stages", str(stages), "--replicas", str(replicas), "--sync-batch-norm", *flags]
    several = trained(train, "several", stages * replicas, *arguments, rule=rule)
    assert_equal(several, one, exactly=False)
    for ours, theirs in zip(rows(several), rows(one), strict=True):
        assert float(ours["train_loss"]) == pytest.approx(float(theirs["train_loss"]), rel=1e-3)
        assert ours["test_accuracy"] == theirs["test_accuracy"]
        assert float(ours["train_accuracy"]) == pytest.approx(float(theirs["train_accuracy"]), abs=0.06)


@pytest.mark.slow
def test_replicas_without_flags_and_of_backpropagation(train):
    output, done = train("two", 2)
    assert done.returncode == 0 and "2, 1 stage of 2 replicas" in done.stdout
    assert "each replica takes 4 images" in " ".join(done.stdout.split())
    again = trained(train, "again", 2, "--replicas", "2")
    assert_equal(again, output)
    plain = trained(train, "bp", 2, rule=["--rule", "bp"])
    assert (plain / "checkpoint.pt").exists() and len(rows(plain)) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at", "grid", "torchrun"),
    [(2, (2, 1), False), (5, (2, 1), True), (6, (2, 2), False), (5, (1, 1), False)],
    ids=str,
)
def test_a_killed_process_is_replaced(train, undisturbed, grid, at, torchrun):
    """Before there is a checkpoint, after step 3, or then."""
    stages, replicas = grid
    whole, size = undisturbed(*grid), stages * replicas
    arguments = ["--stages", str(stages), "--replicas", str(replicas)]
    mishap = f"{size - 1}:{at}:kill"
    output, done = train("killed", size, *arguments, mishap=mishap, restarts=3, torchrun=torchrun)
    assert done.returncode == 0, done.stderr
    assert ("resumes after epoch 1" in done.stdout) == (at > 3)
    assert_equal(output, whole)
    assert rows(output) == rows(whole)


@pytest.mark.slow
@pytest.mark.parametrize(("what", "replicas"), [("ctrl-c", 2), ("interrupt", 2), ("sigterm", 1)])
def test_an_interrupt_stops_all_after_the_same_batch(train, undisturbed, what, replicas):
    whole, size = undisturbed(2, replicas), 2 * replicas
    arguments = ["--stages", "2", "--replicas", str(replicas)]
    # Two of them are signals to torchrun.
    output, done = train("stopped", size, *arguments, mishap=f"{replicas}:5:{what}", torchrun=what != "interrupt")
    assert done.returncode != 0
    assert "stopped in epoch 2 after" in done.stderr and f"go on with: torchrun --nproc-per-node {size}" in done.stderr
    assert done.stderr.count("stopped in epoch") == 1
    resumed = trained(train, "stopped", size, resume=True)
    assert resumed == output
    assert_equal(output, whole)
    assert len(rows(output)) == 3


@pytest.mark.slow
def test_resumed_on_other_grids(train, undisturbed):
    """In the middle of an epoch, in one process; and at its end, in two replicas of two stages."""
    one = undisturbed()
    output, done = train("grid", 2, "--stages", "2", mishap="1:5:interrupt")
    assert done.returncode != 0 and (output / "checkpoint").is_dir()
    assert main(["train", "--output", str(output), "--resume"]) == 0
    assert_equal(output, one)
    assert rows(output) == rows(one)
    assert (output / "checkpoint.pt").exists() and not (output / "checkpoint").exists()
    output, done = train("wider", 2, "--stages", "2", mishap="1:5:interrupt")
    trained(train, "wider", 4, "--stages", "2", "--sync-batch-norm", resume=True)
    assert_equal(output, one, exactly=False)
    assert json.loads((output / "config.json").read_text())["settings"]["replicas"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("at", [4, 5], ids=["before two batches", "before the smaller last batch alone"])
def test_one_processes_checkpoint_goes_on_in_stages(train, undisturbed, monkeypatch, at):
    one = undisturbed()
    plain, steps = LocalLearner.step, []

    def step(self, images, labels):
        steps.append(len(labels))
        if len(steps) == at:
            signal.raise_signal(signal.SIGINT)
        return plain(self, images, labels)

    with monkeypatch.context() as patch:
        patch.setattr(LocalLearner, "step", step)
        output, done = train("early", 1)
    assert done.returncode == 130 and checkpoint.load(output / "checkpoint.pt")["progress"]["epochs"] == 1
    trained(train, "early", 2, "--stages", "2", resume=True)
    assert_equal(output, one)
    assert rows(output) == rows(one)
    assert not (output / "checkpoint.pt").exists()


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(train):
    output, done = train("error", 2, "--stages", "2", mishap="1:4:error")
    assert done.returncode != 0
    assert "error (rank 1 of 2): Traceback" in done.stderr and "KeyError: 'a mishap'" in done.stderr
    assert done.stderr.count("error (rank") == 1


@pytest.mark.slow
def test_what_cannot_work_is_one_line_and_begins_nothing(train):
    output, done = train("refused", 2, "--stages", "2", "--amp", "fp16")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "--amp fp16 is not for stages" in line and not output.exists()
    _, done = train("refused", 2, "--memory-budget", "1GiB")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "--memory-budget are planned for one process" in line
    _, done = train("refused", 2, "--batch-size", "9")
    assert "choose a multiple of 2" in done.stderr and not output.exists()
    # A run that is there is not taken up by torchrun's restarts.
    trained(train, "there", 1)
    there, done = train("there", 2, restarts=1)
    assert done.returncode != 0 and "holds a run" in done.stderr and (there / "checkpoint.pt").exists()


@pytest.mark.slow
def test_a_folder_in_use_is_one_line_in_all_processes(train, tmp_path):
    """The first process alone locks it; here another one has it, so that no epoch begins."""
    with RunLock(tmp_path / "used"):
        output, done = train("used", 2, "--stages", "2")
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode != 0 and f"{output} is in use by process {os.getpid()} on" in line
    assert not list(output.iterdir())


@pytest.mark.slow
def test_a_damaged_folder_is_one_line(train):
    output = trained(train, "damaged", 2, "--stages", "2")
    for pattern in ("*/*.distcp", "*/.metadata", "rest.pt"):
        (path, *_) = (output / "checkpoint").glob(pattern)
        whole = path.read_bytes()
        damaged = bytearray(whole)
        damaged[len(whole) // 2] ^= 0x10
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="checkpoint: not a readable checkpoint"):
            load_run(output, "cpu")
        if pattern == "*/*.distcp":
            _, done = train("damaged", 2, resume=True)
            (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
            assert done.returncode != 0 and f"{path.name} has another checksum than when it was written" in line
        path.write_bytes(whole)
    load_run(output, "cpu")


def test_stages_and_replicas_make_up_all_processes():
    def grid(size, *asked):
        environment = {"RANK": "0", "WORLD_SIZE": str(size)} if size else {}
        return Launch(environment).grid(*asked)

    assert grid(0, None, None) == (1, 1)
    assert grid(4, None, None) == (1, 4)
    assert grid(4, 2, None) == (2, 2)
    assert grid(4, None, 2) == (2, 2)
    assert grid(4, None, None, (2, 2)) == (2, 2)
    assert grid(4, None, None, (3, 1)) == (1, 4)
    assert grid(4, 4, None, (2, 2)) == (4, 1)
    for size, asked, expected in (
        (0, (2, None), "this is one; start them with: torchrun --nproc-per-node 2 -m auglocal_ext train --stages 2"),
        (4, (3, None), "--stages 3 --replicas 1 is for 3 processes and torchrun has started 4"),
        (4, (2, 3), "--nproc-per-node 6"),
        (4, (0, None), "--stages must be at least 1"),
    ):
        with pytest.raises(SettingsError) as refused:
            grid(size, *asked)
        assert expected in str(refused.value)


@pytest.mark.slow
def test_stages_without_torchrun_are_refused(tmp_path, capsys):
    assert main(["train", "--data", "nowhere", "--output", str(tmp_path / "run"), "--stages", "2"]) == 1
    assert "torchrun --nproc-per-node 2 -m auglocal_ext train --stages 2" in capsys.readouterr().err
    assert main(["train", "--data", "nowhere", "--output", str(tmp_path / "run"), "--stage-cuts", "2"]) == 1
    assert "--stage-cuts is for several stages" in capsys.readouterr().err


def test_all_stop_after_the_round_that_the_leader_names():
    """Each process is in another round when one of them is asked to stop; none has gone past the last one."""
    store = torch.distributed.HashStore()
    leader, ahead, behind = (SharedStop(store, "training", leads) for leads in (True, False, False))
    assert not any(stop.after(4, False) for stop in (leader, ahead, behind))
    assert not behind.after(5, True), "asked, but only the leader knows how far all can come"
    assert not leader.after(6, False) and not ahead.after(6, False)
    assert leader.after(7, False) and ahead.after(7, False)
    assert not behind.after(6, True) and behind.after(7, True)
    late = SharedStop(store, "training", False)
    assert late.after(9, False), "a loop that begins after the last round ends at once"

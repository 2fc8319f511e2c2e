"""Runs keep the providers they have chosen: a resumed one takes them, and processes of a group have the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tuned import RIVALS, Races, new_process, tune

from auglocal_ext import AugLocal, LocalSequential, LocalStep, models
from auglocal_ext.distributed import Stored
from auglocal_ext.ops import providers, tuning
from auglocal_ext.tasks import Classification
from auglocal_ext.training.config.train_config import TrainConfig, resolve, to_dict
from auglocal_ext.training.run import saving
from auglocal_ext.training.run.learners import make_learner


@pytest.fixture
def races(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Races:
    return tune(monkeypatch, tmp_path)


def step() -> LocalStep:
    torch.manual_seed(7)
    net = LocalSequential(models.resnet_cifar(8, width=4), AugLocal(2), 10, (3, 16, 16), fused=True)
    return LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))


def batches(count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(11)
    images = torch.randn(count, 6, 3, 16, 16, generator=generator)
    return list(zip(images, torch.randint(0, 10, (count, 6), generator=generator), strict=True))


def train(step: LocalStep, count: int, begin: int = 0) -> LocalStep:
    for batch in batches(4)[begin:count]:
        step(*batch)
    return step


def elsewhere(races: Races, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """A new process on a machine where nothing was measured, and the other provider would win."""
    new_process()
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    races.seconds = {name: 1 / seconds for name, seconds in races.seconds.items()}
    races.runs.clear()


@pytest.mark.parametrize("way", ["state_dict", "save"])
def test_a_resumed_run_takes_the_providers_of_the_run(races, monkeypatch, tmp_path, way):
    whole = train(step(), 4)
    assert len(races) > 2 and set(tuning.decided().values()) == {"reference"}
    new_process()
    half = train(step(), 2)
    if way == "save":
        half.save(tmp_path / "checkpoint")
    network, state = half.net.state_dict(), half.state_dict()
    elsewhere(races, monkeypatch, tmp_path / "elsewhere")
    resumed = train(step(), 1)  # which has measured, and may have captured a graph
    assert "cpu" in tuning.decided().values()
    races.runs.clear()
    released = []
    monkeypatch.setattr(resumed._graphs, "outdate", lambda: released.append(True))
    if way == "save":
        resumed.load(tmp_path / "checkpoint")
    else:
        resumed.net.load_state_dict(network)
        resumed.load_state_dict(state)
    assert released  # a captured step is captured again
    train(resumed, 4, begin=2)
    assert not races
    for name, value in whole.net.state_dict().items():
        assert torch.equal(value, resumed.net.state_dict()[name]), name


def test_a_state_without_providers_loads(races):
    state = train(step(), 1).state_dict()
    del state["providers"]
    step().load_state_dict(state)


def test_several_processes_take_them_from_the_file_of_one(races, tmp_path):
    config = TrainConfig("", str(tmp_path), network="resnet20", rule="auglocal", width=4, modules=4)
    config, task, shape = resolve(config, "cifar10", False), Classification(10), (3, 16, 16)
    learner = make_learner(config, shape, task, torch.device("cpu"))
    learner.step(*batches(1)[0])
    facts = {"input_shape": shape, "classes": list("abcdefghij")}
    parts = {"network": learner.network.state_dict(), "learner": learner.state_dict()}
    used = tuning.decided()
    new_process()
    saving._convert({"settings": to_dict(config), "data": facts, **parts}, task, tmp_path / "folder")
    assert used and Stored(tmp_path / "folder").rest["providers"] == used


def _two_stages(rank: int, folder: str) -> None:
    """Each process would choose otherwise by itself, and has done so before the group's step was made."""
    os.environ.update(AUGLOCAL_TUNE="1", XDG_CACHE_HOME=f"{folder}/{rank}")
    providers.rivals = lambda op, device, dtype: list(RIVALS)
    tuning.race = Races(RIVALS[rank])
    tuning._decided["before"] = RIVALS[rank]
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,), mesh_dim_names=("stage",))
    torch.manual_seed(7)
    net = LocalSequential(models.resnet_cifar(8, width=4), AugLocal(2), 10, (3, 16, 16), fused=True)
    run = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.1), mesh=mesh)
    train(run, 2)
    everyone = [{}, {}]
    torch.distributed.all_gather_object(everyone, tuning.decided())
    both = everyone[0].keys() & everyone[1].keys()
    assert both and "before" not in both
    assert all(everyone[0][form] == everyone[1][form] for form in both)
    run.save(f"{folder}/checkpoint")
    run.load(f"{folder}/checkpoint")
    assert tuning.decided() == {**everyone[0], **everyone[1]}
    run.close()


@pytest.mark.slow
def test_processes_of_a_run_use_the_same(tmp_path):
    from distributed.ranks import run

    run(2, _two_stages, str(tmp_path))

"""A finished run comes back out of its folder: the same network, the same images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from runs import trainer

from auglocal_ext import LocalSequential
from auglocal_ext.training import CheckpointError, DataError, ImageArrays, SettingsError, load_run
from auglocal_ext.training.run import checkpoint

KINDS = [
    pytest.param({"rule": "bp"}, id="bp"),
    pytest.param({"rule": "auglocal", "depth": 2}, id="auglocal"),
    pytest.param({"rule": "auglocal", "depth": 2, "fused": False, "channels_last": True}, id="eager channels-last"),
    pytest.param({"rule": "bp", "channels_last": True}, id="bp channels-last"),
    pytest.param({"rule": "contsup", "context": "R1E", "modules": 3}, id="contsup"),
    pytest.param({"rule": "contsup", "context": "E", "head": "auglocal:depth=2"}, id="rule as head"),
    pytest.param({"rule": "infopro", "weights": (5.0, 0.05, 0.2, 0.5), "modules": 2}, id="infopro"),
    pytest.param({"rule": "predsim"}, id="predsim"),
    pytest.param({"rule": "dgl", "modules": (1,)}, id="dgl"),
    pytest.param({"rule": "man", "modules": 2}, id="man"),
    pytest.param({"rule": "greedy"}, id="greedy"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_network_is_the_one_that_was_trained(config, separable, kind):
    run = trainer(config(epochs=1, **kind), separable)
    run.fit()
    saved = load_run(run.output, "cpu")
    assert isinstance(saved.network, LocalSequential) == (kind["rule"] != "bp")
    assert (saved.name, saved.epochs, saved.config) == ("run", 1, run.config)
    assert (saved.classes, saved.input_shape) == (("red", "green", "blue"), (3, 16, 16))
    assert not any(module.training for module in saved.network.modules())
    run.network.eval()
    images, labels = next(saved.source(separable).test())
    with torch.no_grad():
        assert torch.equal(saved.network(images), run.network(images))
        if kind["rule"] != "bp":  # the heads are there too
            found, expected = saved.network(images, labels), run.network(images, labels)
            assert torch.equal(found.module_losses, expected.module_losses)
    (weight,) = (p for name, p in saved.network.named_parameters() if name.endswith("layer2_0.conv1.weight"))
    assert weight.is_contiguous(memory_format=torch.channels_last) == bool(kind.get("channels_last"))
    assert images.is_contiguous(memory_format=torch.channels_last) == bool(kind.get("channels_last"))


def test_the_checkpoint_itself_may_be_named(config, separable):
    run = trainer(config(epochs=1), separable)
    run.fit()
    assert load_run(run.output / "checkpoint.pt").path == run.output


def test_batches_are_those_of_the_training(config, separable):
    run = trainer(config(epochs=1), separable)
    batches = run._batches.train(3)  # before it is fitted, so that its generator has drawn nothing
    expected = [images.clone() for images, _ in batches]
    run.save()
    source = load_run(run.output, "cpu").source(separable)
    assert source.steps == len(expected) == 4
    for (images, _), wanted in zip(source.train(3), expected, strict=True):
        assert torch.equal(images, wanted)
    assert [len(labels) for _, labels in load_run(run.output).source(separable, batch_size=7).test()] == [7, 5]


def test_moved_data_and_fewer_images(config, image_folder, tmp_path):
    folder = image_folder()
    run = trainer(config(data=str(folder), epochs=1, train_images=8, padding=2), None)
    run.fit()
    moved = tmp_path / "moved"
    shutil.move(folder, moved)
    saved = load_run(run.output, "cpu")
    with pytest.raises(DataError, match="no such folder"):
        saved.source()
    trained = run.data.train_images
    assert torch.equal(saved.images(moved).train_images, trained)
    fewer = saved.images(moved, train_images=5, seed=77).train_images
    assert len(fewer) == 5
    for image in fewer:  # none that the network has not been trained on
        assert any(torch.equal(image, other) for other in trained)
    with pytest.raises(SettingsError, match="trained on 8 images: choose at most as many training images, not 9"):
        saved.source(moved, train_images=9)


def test_other_data_is_refused(config, separable):
    run = trainer(config(epochs=1), separable)
    run.fit()
    saved = load_run(run.output, "cpu")
    parts = (separable.train_images, separable.train_labels, separable.test_images, separable.test_labels)
    with pytest.raises(CheckpointError, match="on classes red, green, blue, this data has red, blue, green"):
        saved.source(ImageArrays("folder", ("red", "blue", "green"), *parts))
    cropped = (parts[0][..., :12], parts[1], parts[2][..., :12], parts[3])
    with pytest.raises(CheckpointError, match="images of shape 3, 16, 16, this data has 3, 16, 12"):
        saved.source(ImageArrays("folder", separable.classes, *cropped))


def test_what_is_no_run(config, separable, tmp_path):
    with pytest.raises(CheckpointError, match="expected the folder of a run.*there is no such file or folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="expected the folder of a run.*there is none in it"):
        load_run(tmp_path)
    run = trainer(config(epochs=1), separable)
    run.fit()
    with pytest.raises(SettingsError, match="--device is auto, cpu"):
        load_run(run.output, "abacus")

    state = checkpoint.load(run.output / "checkpoint.pt")
    del state["format"]
    state["settings"]["width"] = 6
    checkpoint.save(state, run.output / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="(?s)another version wrote it, train it again.*size mismatch"):
        load_run(run.output, "cpu")
    state["settings"]["gamma"] = 2
    checkpoint.save(state, run.output / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="unknown settings gamma"):
        load_run(run.output, "cpu")


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="a cannot be read: File name too long"):
        load_run(tmp_path / ("a" * 300))

    def closed(path, *arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "exists", closed)
    with pytest.raises(CheckpointError, match="run cannot be read: Permission denied"):
        load_run(tmp_path / "run")

"""Images read from disk in every epoch: the same ones however they are read, and exactly resumable."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from auglocal_ext.training import DataError, Trainer, load_data
from auglocal_ext.training.config.recipes import RECIPES
from auglocal_ext.training.data.batches import make_batches
from auglocal_ext.training.errors import WorkerError

try:
    import torchvision  # noqa: F401
except Exception as error:
    pytest.skip(f"torchvision does not import here: {error}", allow_module_level=True)


@pytest.fixture
def mixed(image_folder, write_image):
    """14 training and 6 test images of different sizes."""
    root = image_folder(train=7, test=3, size=(20, 30))
    write_image(root / "train" / "cat" / "000.png", (40, 24), 1)
    return load_data(root, streamed_size=16, workers=0, progress=False)


def batches(data, workers=0):
    return make_batches(
        data,
        RECIPES["imagenet"].augmentation,
        batch_size=4,
        seed=3,
        device=torch.device("cpu"),
        channels_last=True,
        workers=workers,
    )


def test_shapes_and_counts(mixed):
    source = batches(mixed)
    sizes = [tuple(images.shape) for images, _ in source.train(1)]
    assert sizes == [(4, 3, 16, 16)] * 3 + [(2, 3, 16, 16)] and source.steps == 4
    labels = torch.cat([labels for _, labels in source.test()])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]


def test_choices_depend_on_neither_workers_nor_global_state(mixed):
    inline = list(batches(mixed).train(2))
    torch.manual_seed(77)
    before = torch.get_rng_state()
    parallel = list(batches(mixed, workers=2).train(2))
    assert torch.equal(before, torch.get_rng_state())
    for (a, b), (c, d) in zip(inline, parallel, strict=True):
        assert torch.equal(a, c) and torch.equal(b, d)


def test_an_epoch_can_be_taken_up_in_its_middle(mixed):
    whole, rest = list(batches(mixed).train(1)), list(batches(mixed).train(1, first=2))
    assert len(rest) == 2 and all(torch.equal(a[0], b[0]) for a, b in zip(whole[2:], rest, strict=True))


def test_epochs_differ_in_order_and_in_crops(mixed):
    source = batches(mixed)
    first, second = (next(iter(source.train(epoch)))[0] for epoch in (1, 2))
    assert not torch.equal(first, second)
    images = source._loader.dataset
    assert not torch.equal(images["train", 0, 1][0], images["train", 0, 2][0])
    assert torch.equal(images["train", 0, 1][0], images["train", 0, 1][0])


def test_the_same_workers_serve_every_pass_also_after_one_that_was_left(mixed):
    inline, source = batches(mixed), batches(mixed, workers=1)
    passes = (lambda b: b.train(1), lambda b: b.test(), lambda b: b.train(2, first=1), lambda b: b.test())
    workers = set()
    for take in passes:
        next(take(source))  # left after one batch
        for (a, b), (c, d) in zip(take(inline), take(source), strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)
        workers |= {worker.pid for worker in source._loader._iterator._workers}
    assert len(workers) == 1


def test_a_run(mixed, config):
    summary = Trainer(config(epochs=1, batch_size=4), mixed, bars=False, say=lambda line: None).fit()
    assert 0 <= summary.last_accuracy <= 1
    assert Trainer(config(epochs=1, batch_size=4), mixed, bars=False).config.recipe == "imagenet"


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_damaged_during_a_run_is_one_line(mixed, workers):
    source, path = batches(mixed, workers), mixed.train.paths[3]
    with open(path, "wb") as file:
        file.write(b"no image")
    with pytest.raises(DataError) as refused:
        list(source.train(1))
    assert str(refused.value).startswith(f"{path}: unreadable image") and len(str(refused.value).splitlines()) == 1


@pytest.mark.slow
def test_a_killed_worker_is_one_line(mixed, monkeypatch):
    source, here = batches(mixed, 1), os.getpid()

    def killed(path):
        if os.getpid() != here:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("auglocal_ext.training.data.stream.read_image", killed)
    with pytest.raises(WorkerError, match="a process that reads images was killed .*take fewer --workers"):
        list(source.train(1))

"""The text of a finished run is read out of its folder, and nothing is written that was not asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from runs import trainer
from texts import settings, text

from auglocal_ext.training import CheckpointError, SettingsError, load_run


def folder_of_texts(path, seed):
    path.mkdir()
    for name in ("a.txt", "b.txt"):
        (path / name).write_text(text(200, seed))
    return path


def contents(path):
    return {file: file.read_bytes() for file in Path(path).rglob("*") if file.is_file()}


@pytest.fixture
def saved(tmp_path):
    """A run on a folder of texts, whose joined bytes are in its ``tokens.bin``."""
    data = folder_of_texts(tmp_path / "texts", seed=1)
    trainer(settings(tmp_path, data=str(data), epochs=1), None).fit()
    return load_run(tmp_path / "run", "cpu")


def test_a_moved_run_keeps_its_tokens_with_it(saved, tmp_path):
    saved.path.rename(tmp_path / "after")
    before = contents(tmp_path)
    found = load_run(tmp_path / "after", "cpu").text()
    assert found.file.path == str(tmp_path / "after" / "tokens.bin") and contents(tmp_path) == before


def test_another_text_leaves_the_tokens_of_the_run(saved, tmp_path):
    other = folder_of_texts(tmp_path / "other", seed=2)
    before = contents(tmp_path)
    for read in (saved.text, saved.source):
        with pytest.raises(SettingsError, match=r"other: its tokens are not among those in .*run.*text\(data, folder="):
            read(other)
    assert contents(tmp_path) == before
    found = saved.text(other, folder=tmp_path / "tokens")
    assert found.file.path == str(tmp_path / "tokens" / "tokens.bin") and before.items() <= contents(tmp_path).items()
    first, _ = next(saved.source(found).test())
    begin = bytes(first[0].tolist())
    assert begin in (tmp_path / "other" / "b.txt").read_bytes()


def test_tokens_that_are_gone_are_written_where_one_says(saved):
    tokens = (saved.path / "tokens.bin").read_bytes()
    (saved.path / "tokens.bin").unlink()
    with pytest.raises(SettingsError, match="reading a run writes none"):
        saved.source()
    assert not (saved.path / "tokens.bin").exists()
    saved.text(folder=saved.path)
    assert (saved.path / "tokens.bin").read_bytes() == tokens


def test_a_text_that_has_changed_is_refused(tmp_path):
    trainer(settings(tmp_path, epochs=1), None).fit()
    saved, path = load_run(tmp_path / "run", "cpu"), tmp_path / "text.txt"
    assert saved.text().file.path == str(path)
    path.write_text(text(300, seed=9))
    with pytest.raises(CheckpointError, match="text.txt is not what .*run was trained on.* source\\(data\\)"):
        saved.source()
    assert saved.text(path).file.path == str(path)


def test_methods_of_another_kind_of_run(saved, config, separable, tmp_path):
    before = contents(tmp_path)
    for read in (saved.images, saved.images_config):
        with pytest.raises(SettingsError, match=r"run was trained on text: call text\(\), or source\(\) for batches"):
            read(tmp_path / "other")
    assert contents(tmp_path) == before
    with pytest.raises(SettingsError, match="train_images=3 cannot be chosen of .*, which was trained on text"):
        saved.source(train_images=3)
    of_images = trainer(config(epochs=1, output=str(tmp_path / "images")), separable)
    of_images.fit()
    images = load_run(of_images.output, "cpu")
    with pytest.raises(SettingsError, match=r"images was trained on images: call images\(\), or source\(\)"):
        images.text()
    with pytest.raises(SettingsError, match="train_images=3 cannot be chosen of images that are passed as they are"):
        images.source(separable, train_images=3)


def test_images_are_read_without_a_trace(config, image_folder):
    data = image_folder()
    run = trainer(config(data=str(data), epochs=1), None)
    run.fit()
    before = contents(data), contents(run.output)
    saved = load_run(run.output, "cpu")
    images, _ = next(saved.source(data).test())
    assert torch.equal(saved.images().test_images, saved.images(data).test_images) and len(images)
    assert (contents(data), contents(run.output)) == before

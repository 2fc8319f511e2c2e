"""A text as tokens, in training and validation windows."""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from texts import text

from auglocal_ext.training import DataError, SettingsError, load_text
from auglocal_ext.training.data import text_files
from auglocal_ext.training.data.datasets import detect
from auglocal_ext.training.data.order import Part
from auglocal_ext.training.data.text import IGNORED, TextBatches
from auglocal_ext.training.data.text_files import token_file
from auglocal_ext.training.errors import OutputError

CPU = torch.device("cpu")


def batches(found, part=None, batch_size=4):
    return TextBatches(found, batch_size=batch_size, seed=3, device=CPU, **({} if part is None else {"part": part}))


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(np.random.default_rng(0).permutation(np.arange(1000) % 251).astype(np.uint8)))
    return path


def test_training_windows_are_each_token_once_in_another_order_and_offset_each_epoch(source, tmp_path):
    found = load_text(source, 16, tmp_path)
    content = source.read_bytes()
    assert (found.train_tokens, found.test_tokens, found.train_count) == (950, 50, 58)
    made, seen = batches(found), []
    assert made.steps == 15
    for epoch in (1, 2):
        windows = list(made.train(epoch))
        assert len(windows) == made.steps and len(windows[-1][0]) == 2
        x, y = torch.cat([x for x, _ in windows]), torch.cat([y for _, y in windows])
        assert x.dtype == y.dtype == torch.int64 and x[:, 1:].equal(y[:, :-1])
        begin = made.offset(epoch)
        expected = [content[i : i + 17] for i in range(begin, begin + 58 * 16, 16)]
        assert begin + 58 * 16 < 950  # no token of validation
        assert sorted(bytes([*a, b]) for a, b in zip(x.tolist(), y[:, -1].tolist(), strict=True)) == sorted(expected)
        seen.append((begin, x[:4].tolist()))
    assert seen[0][0] != seen[1][0] and seen[0][1] != seen[1][1]


def test_an_epoch_goes_on_in_its_middle(source, tmp_path):
    made = batches(load_text(source, 16, tmp_path))
    whole, rest = list(made.train(2)), list(batches(load_text(source, 16, tmp_path)).train(2, 9))
    assert len(rest) == 6 and all(
        a.equal(b) for x, y in zip(whole[9:], rest, strict=True) for a, b in zip(x, y, strict=True)
    )


@pytest.mark.parametrize("count", [1, 2])
def test_validation_predicts_each_of_its_tokens_once(source, tmp_path, count):
    found = load_text(source, 16, tmp_path)
    seen, before = [], []
    for index in range(count):
        for x, y in batches(found, Part(index, count)).test():
            counts = y != IGNORED
            seen += y[counts].tolist()
            before += x[counts].tolist()
            assert int(x.min()) >= 0
    content = source.read_bytes()
    assert bytes(seen) == content[950:] and bytes(before) == content[949:-1]


def test_replicas_share_a_batch(source, tmp_path):
    found = load_text(source, 16, tmp_path)
    whole = [x for x, _ in batches(found).train(1)]
    parts = [[x for x, _ in batches(found, Part(index, 2)).train(1)] for index in (0, 1)]
    assert all(torch.cat(each).equal(x) for *each, x in zip(*parts, whole, strict=True))
    with pytest.raises(SettingsError, match="3 replicas cannot have equal parts"):
        batches(found, Part(0, 3))
    with pytest.raises(SettingsError, match="4 validation windows of 16 tokens are too few for 8"):
        batches(found, Part(0, 8), 8)


def test_a_folder_is_its_files_joined_by_blank_lines(tmp_path):
    folder = tmp_path / "folder"
    (folder / "b").mkdir(parents=True)
    (folder / "c.txt").write_bytes(b"third")
    (folder / "b" / "a.TXT").write_bytes(b"sec\xffond")
    (folder / "a.txt").write_bytes(b"first")
    (folder / "notes.md").write_bytes(b"no")
    (folder / ".git").mkdir()
    for hidden in (".a.txt", ".git/b.txt"):
        (folder / hidden).write_bytes(b"no")
    made = token_file(folder, None, tmp_path / "run")
    assert made.mapped().tobytes() == b"first\n\nthird\n\nsec\xffond" == (tmp_path / "run" / "tokens.bin").read_bytes()
    assert (made.tokens, made.source_bytes, made.vocabulary) == (21, 21, 256)
    assert detect(folder) == detect(folder / "a.txt") == "text"


def test_the_bytes_of_one_file_are_not_copied(source, tmp_path):
    made = token_file(source, None, tmp_path / "run")
    assert isinstance(made.mapped(), np.memmap) and made.path == str(source)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"\xfd7zXZ\x00 and more", "a xz archive, whose bytes are no text; unpack it"),
        (b"x", "1 token is too few"),
        (b"x" * 19, "19 tokens are too few; expected at least 20"),
        (b"x" * 33, "33 tokens are too few: 32 of them are for training, and windows of --context 17 need 34"),
    ],
)
def test_texts_that_cannot_be_trained_on(tmp_path, content, said):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said) as caught:
        load_text(path, 17, tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bytes", "tokens"])
def test_a_text_is_read_block_by_block(tmp_path, monkeypatch, kind):
    path, read, blocks = tmp_path / "a.txt", [], text_files._blocks
    path.write_text("a line\n" * 100)

    def noted(path):
        for block in blocks(path):
            read.append(block)
            yield block

    monkeypatch.setattr(text_files, "_BLOCK", 50)
    monkeypatch.setattr(text_files, "_blocks", noted)
    reader = SimpleNamespace(encode=lambda piece, add_special_tokens: SimpleNamespace(ids=[1] * len(piece)))
    parts = text_files._bytes([str(path)]) if kind == "bytes" else text_files._ids([str(path)], reader)
    assert [next(parts)[1] for _ in range(3)] == ([0, 50, 50] if kind == "bytes" else [0, 49, 49])
    assert len(read) == 2


def test_folders_of_texts(tmp_path):
    folder = tmp_path / "books" / "author"
    folder.mkdir(parents=True)
    (folder / "one.txt").write_text("text")
    assert detect(tmp_path / "books", text=True) == "text"
    with pytest.raises(DataError, match="no data set recognised"):
        detect(tmp_path / "books")
    with pytest.raises(DataError, match="none.txt: no such file or folder"):
        detect(tmp_path / "none.txt", text=True)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe: neither a file nor a folder"):
        detect(tmp_path / "pipe")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load_text(tmp_path / "none.txt", 16, tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no .txt files"):
        load_text(tmp_path / "empty", 16, tmp_path)
    (tmp_path / "empty" / "lost.txt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot be read|no such file"):
        load_text(tmp_path / "empty", 16, tmp_path)


def test_what_is_said_of_tokens_is_of_these_after_a_crash(tmp_path, monkeypatch):
    for name, content in (("a.txt", "one"), ("b.txt", "two")):
        (tmp_path / name).write_text(content)
    token_file(tmp_path, None, tmp_path / "run")
    (tmp_path / "a.txt").write_text("ONE")
    written = text_files._written

    def crashes(path, blocks):
        if path.name == text_files.ABOUT:
            raise KeyboardInterrupt
        written(path, blocks)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(text_files, "_written", crashes)
        token_file(tmp_path, None, tmp_path / "run")
    (tmp_path / "a.txt").write_text("one")
    assert token_file(tmp_path, None, tmp_path / "run").mapped().tobytes() == b"one\n\ntwo"


def test_tokens_that_cannot_be_written(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "b.txt").write_text("text")
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OutputError, match="tokens.bin cannot be written"):
        token_file(tmp_path, None, tmp_path / "run")


@pytest.fixture
def tokenizer(tmp_path):
    """Words, line ends and single bytes."""
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.BPE())
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([text(300)], trainer)
    made.enable_truncation(8)
    made.enable_padding(length=64)
    path = tmp_path / "tokenizer.json"
    made.save(str(path))
    return path


def test_a_tokenizer_is_run_once(tokenizer, tmp_path, monkeypatch):
    library = pytest.importorskip("tokenizers")
    data, run = tmp_path / "text.txt", tmp_path / "run"
    data.write_text(text(400) + "caf\xe9", encoding="utf-8")
    monkeypatch.setattr("auglocal_ext.training.data.text_files._BLOCK", 100)  # several pieces, some cut in a character
    made = token_file(data, str(tokenizer), run)
    plain = library.Tokenizer.from_file(str(tokenizer))
    plain.no_truncation()
    plain.no_padding()
    mapped = made.mapped()
    assert mapped.dtype == np.uint16 and plain.decode(mapped.tolist()) == data.read_text(encoding="utf-8")
    assert made.vocabulary == plain.get_vocab_size() and made.source_bytes == os.path.getsize(data) > made.tokens
    stamp = (run / "tokens.bin").stat().st_mtime_ns
    assert token_file(data, str(tokenizer), run) == made and (run / "tokens.bin").stat().st_mtime_ns == stamp
    data.write_text(text(400, seed=2))
    other = token_file(data, str(tokenizer), run)
    assert other.checksum != made.checksum and plain.decode(other.mapped().tolist()) == data.read_text()


def test_texts_and_tokenizers_that_do_not_go_together(tokenizer, tmp_path):
    data = tmp_path / "text.txt"
    data.write_bytes(b"ab\n" * 40 + b"\xff rest")
    with pytest.raises(DataError, match=r"text.txt: byte 120 is no UTF-8 .* leave out --tokenizer"):
        token_file(data, str(tokenizer), tmp_path / "run")
    assert not list((tmp_path / "run").glob("tokens*"))
    with pytest.raises(DataError, match="a folder; expected a tokenizer.json"):
        token_file(data, str(tmp_path), tmp_path)
    with pytest.raises(DataError, match="no such file; expected a tokenizer.json"):
        token_file(data, str(tmp_path / "none.json"), tmp_path)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="no tokenizer.json of Hugging Face can be read"):
        token_file(data, str(tmp_path / "other.json"), tmp_path)


def test_a_tokenizer_that_knows_little_of_a_text(tmp_path):
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    made.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("the of in the\n" * 10)
    with pytest.warns(UserWarning, match="50% of the text's tokens are <unk>"):
        token_file(tmp_path / "a.txt", str(tmp_path / "tokenizer.json"), tmp_path / "run")
    (tmp_path / "a.txt").write_text("the the\n" * 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        token_file(tmp_path / "a.txt", str(tmp_path / "tokenizer.json"), tmp_path / "run")


def test_a_text_that_the_tokenizer_cannot_encode(tmp_path):
    library = pytest.importorskip("tokenizers")
    made = library.Tokenizer(library.models.WordLevel({"the": 0, "of": 1}, unk_token="<unk>"))  # which it does not have
    made.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "a.txt").write_text("in\n")
    with pytest.raises(DataError, match="a.txt: --tokenizer cannot encode this text: .*UNK"):
        token_file(tmp_path / "a.txt", str(tmp_path / "tokenizer.json"), tmp_path / "run")
    assert not list((tmp_path / "run").glob("tokens*"))


def test_without_the_package_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match="needs the package tokenizers .*: pip install tokenizers"):
        token_file(tmp_path / "a.txt", "tokenizer.json", tmp_path)

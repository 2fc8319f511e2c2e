"""Text files as one row of tokens in a file: bytes as they are, or the ids of a tokenizer, written once."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from ...distributed.checkpoint_files import replaced
from ..errors import DataError, OutputError
from ..paths import user_path
from ..progress_bar import progress_bar
from .image_file import files_below, readable

ENDING = ".txt"

BYTES = 256
"""Vocabulary of a text without a tokenizer: its tokens are its bytes."""

JOINT = b"\n\n"
"""Between the documents of a folder: a blank line."""

TOKENS, ABOUT = "tokens.bin", "tokens.json"

_BLOCK = 2**20
_UNKNOWN = 0.05  # share of unknown tokens, above which a tokenizer is taken to be made for other texts

_PACKED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"\x28\xb5\x2f\xfd": "zstd",
}


@dataclass(frozen=True)
class TokenFile:
    """Tokens in a file, and what they were made of.

    Attributes:
        path: of the file, ``tokens`` numbers of ``dtype`` in this machine's byte order.
        dtype: uint8, uint16 or uint32.
        tokens: how many.
        vocabulary: V; every token is in 0 .. V - 1.
        source_bytes: size of the text.
        checksum: SHA-256 of the text, and of the tokenizer.
        tokenizer: path of its file; None for bytes.
    """

    path: str
    dtype: str
    tokens: int
    vocabulary: int
    source_bytes: int
    checksum: str
    tokenizer: str | None

    def mapped(self) -> np.ndarray[Any, Any]:
        """The tokens, read from the file where they are used."""
        with readable(self.path):
            return np.memmap(self.path, dtype=self.dtype, mode="r", shape=(self.tokens,))


def text_files(data: Path) -> list[str]:
    """A text file by itself, or the .txt files in a folder and below it, folder by folder, both sorted.

    Files and folders whose names begin with a dot are left out: systems and editors keep copies of their own there.

    Raises:
        DataError: if there is none, and for one that is empty, compressed or no file.
    """
    with readable(data):
        if data.is_dir():
            found = [path for path in files_below(data, (ENDING,)) if not _hidden(Path(path).relative_to(data))]
            if not found:
                raise DataError(f"{data}: holds no {ENDING} files; expected a text file, or a folder of them")
        else:
            found = [str(data)]
    for path in found:
        _check(path)
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _check(path: str) -> None:
    with readable(path):
        if not os.path.isfile(path):
            raise DataError(f"{path}: {'no file' if os.path.exists(path) else 'no such file'}; expected a text")
        with open(path, "rb") as file:
            start = file.read(8)
    if not start:
        raise DataError(f"{path}: an empty file; remove it, or give one with text")
    packed = next((name for mark, name in _PACKED.items() if start.startswith(mark)), None)
    if packed is not None:
        raise DataError(f"{path}: a {packed} archive, whose bytes are no text; unpack it and give what is in it")


def token_file(
    data: str | Path,
    tokenizer: str | None,
    folder: Path,
    *,
    check: Callable[[int], None] | None = None,
    first: Callable[[str], None] | None = None,
    progress: bool = False,
) -> TokenFile:
    """The tokens of a text.

    The bytes of a single file are read from it. Those of a folder, and the ids of a tokenizer, are written to
    ``tokens.bin`` in ``folder`` first, unless they are there already, made of the same text and tokenizer.

    Args:
        data: a text file, or a folder of .txt files, which are joined by blank lines in the order of
            :func:`text_files`.
        tokenizer: a ``tokenizer.json`` of Hugging Face; None: bytes.
        folder: for the tokens.
        check: called with their number before ``tokens.bin`` is there; what it raises leaves none.
        first: called with the checksum before anything is written; what it raises leaves other tokens as they are.
        progress: show a bar where standard error is a terminal.

    Raises:
        DataError: for a text or a tokenizer that cannot be used.
        OutputError: if the tokens cannot be written.
    """
    files = text_files(user_path(data))
    reader = None if tokenizer is None else open_tokenizer(tokenizer)
    source_bytes, checksum = _checksum(files, tokenizer, progress)
    vocabulary = BYTES if reader is None else _vocabulary(reader)
    path = None if tokenizer is None else str(user_path(tokenizer).resolve())
    if reader is None and len(files) == 1:
        return TokenFile(files[0], "uint8", source_bytes, vocabulary, source_bytes, checksum, None)
    dtype = "uint8" if reader is None else "uint16" if vocabulary <= 2**16 else "uint32"
    about, there = folder / ABOUT, str(folder / TOKENS)
    known = _known(about)
    if known is not None and (known.checksum, known.dtype) == (checksum, dtype):
        return TokenFile(there, dtype, known.tokens, vocabulary, source_bytes, checksum, path)
    if first is not None:
        first(checksum)
    parts = _bytes(files) if reader is None else _ids(files, reader)
    with progress_bar(source_bytes, "reading the text", "B", progress) as bar:
        count = _write(folder, parts, dtype, bar, check)
        made = TokenFile(there, dtype, count, vocabulary, source_bytes, checksum, path)
        _written(about, [json.dumps(asdict(made), indent=2).encode()])
    if reader is not None:
        _warn_of_unknown(made, reader)
    return made


def _warn_of_unknown(file: TokenFile, tokenizer: Any) -> None:
    """Warn where the tokenizer does not know much of the text, which is then easily predicted."""
    name = getattr(tokenizer.model, "unk_token", None)
    unknown = None if name is None else tokenizer.token_to_id(name)
    if unknown is None:
        return
    tokens = file.mapped()
    found = sum(int((tokens[i : i + _BLOCK] == unknown).sum()) for i in range(0, file.tokens, _BLOCK))
    if found > _UNKNOWN * file.tokens:
        warnings.warn(
            f"{found / file.tokens:.0%} of the text's tokens are {name}: the tokenizer does not know what is there, "
            "and losses say little about such a text",
            stacklevel=2,
        )


def vocabulary_to_write(data: str | Path, tokenizer: str | None) -> int | None:
    """Vocabulary of tokens for which :func:`token_file` writes a file; None where it reads the text's own.

    Raises:
        DataError: as :func:`token_file`, for what shows without reading the text.
    """
    files = text_files(user_path(data))
    if tokenizer is not None:
        return _vocabulary(open_tokenizer(tokenizer))
    return None if len(files) == 1 else BYTES


def _vocabulary(tokenizer: Any) -> int:
    return 1 + int(max(tokenizer.get_vocab(with_added_tokens=True).values()))


def open_tokenizer(path: str) -> Any:
    """The tokenizer in a file, which neither cuts nor fills up what it encodes; DataError if it is none."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError(f"--tokenizer needs the package tokenizers ({error}): pip install tokenizers") from error
    file = user_path(path)
    if not file.is_file():
        what = "a folder" if file.is_dir() else "no such file"
        raise DataError(f"--tokenizer {file}: {what}; expected a tokenizer.json of Hugging Face")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no other class
        raise DataError(
            f"--tokenizer {file}: no tokenizer.json of Hugging Face can be read from it: {error}"
        ) from error
    if tokenizer.get_vocab_size() < 2:
        raise DataError(f"--tokenizer {file}: has {tokenizer.get_vocab_size()} tokens; expected two at least")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _checksum(files: list[str], tokenizer: str | None, progress: bool) -> tuple[int, str]:
    """Bytes of the joined text, and the checksum of what the tokens are made of."""
    whole, size = hashlib.sha256(), len(JOINT) * (len(files) - 1)
    total = sum(os.path.getsize(path) for path in files)
    with progress_bar(total, "checking the text", "B", progress) as bar:
        for path in files:
            whole.update(b"document")
            for block in _blocks(path):
                whole.update(block)
                size += len(block)
                bar.update(len(block))
    if tokenizer is not None:
        whole.update(b"tokenizer")
        for block in _blocks(str(user_path(tokenizer))):
            whole.update(block)
    return size, whole.hexdigest()


def _blocks(path: str) -> Iterator[bytes]:
    with readable(path), open(path, "rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _bytes(files: list[str]) -> Iterator[tuple[np.ndarray[Any, Any], int]]:
    """Tokens, and how many bytes of the text they are."""
    for number, path in enumerate(files):
        for block in chain((JOINT if number else b"",), _blocks(path)):
            yield np.frombuffer(block, np.uint8), len(block)


def _ids(files: list[str], tokenizer: Any) -> Iterator[tuple[np.ndarray[Any, Any], int]]:
    """The same by a tokenizer, which is given pieces of about 1 MB, each up to the end of a line if it has one."""
    for number, path in enumerate(files):
        for piece in chain((JOINT.decode() if number else "",), _pieces(path)):
            try:
                ids = tokenizer.encode(piece, add_special_tokens=False).ids
            except Exception as error:  # the library raises no other class
                raise DataError(f"{path}: --tokenizer cannot encode this text: {error}") from error
            yield np.array(ids, np.int64), len(piece.encode())


def _pieces(path: str) -> Iterator[str]:
    decoder, rest, done = codecs.getincrementaldecoder("utf-8")(), "", 0
    for block in chain(_blocks(path), (b"",)):
        pending = len(decoder.getstate()[0])
        try:
            text = rest + decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            where = done - pending + error.start
            raise DataError(
                f"{path}: byte {where} is no UTF-8 ({error.reason}), which a tokenizer needs: convert the file, or "
                "leave out --tokenizer to train on bytes"
            ) from error
        done += len(block)
        cut = (text.rfind("\n") + 1 or len(text)) if block else len(text)
        rest = text[cut:]
        yield text[:cut]


def _known(about: Path) -> TokenFile | None:
    """What is said of the tokens in a folder; None if they are not there whole."""
    try:
        known = TokenFile(**json.loads(about.read_text()))
        size = (about.parent / TOKENS).stat().st_size
        return known if size == known.tokens * np.dtype(known.dtype).itemsize else None
    except (OSError, ValueError, TypeError):
        return None


def _write(
    folder: Path,
    parts: Iterator[tuple[np.ndarray[Any, Any], int]],
    dtype: str,
    bar: Any,
    check: Callable[[int], None] | None,
) -> int:
    count = 0

    def packed() -> Iterator[bytes]:
        nonlocal count
        (folder / ABOUT).unlink(missing_ok=True)  # of other tokens, if this ends between the two files
        for tokens, size in parts:
            count += len(tokens)
            bar.update(size)
            yield tokens.astype(dtype).tobytes()
        if check is not None:
            check(count)

    _written(folder / TOKENS, packed())
    return count


def _written(path: Path, blocks: Any) -> None:
    """Write a file whole or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as file:
            for block in blocks:
                file.write(block)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from error

"""Checkpoints in a folder, by torch.distributed.checkpoint: each tensor once, and the folder complete or absent.

``NAME/rest.pt`` holds everything but tensors, and names the subfolder with torch's files, each with its checksum. It is
replaced atomically and last; only then are the files of the previous checkpoint deleted. The first checkpoint is
written to ``.NAME.partial``, which is renamed when it is complete.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from .agreement import everyone
from .checkpoint_files import PARTIAL, changed, checksum, load_checked, of_system, readable, reason, replaced, sync

FORMAT = 1
_REST, _LIST = "rest.pt", ".metadata"  # the second one is torch's
_Value = TypeVar("_Value")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be saved, read or applied; raised in all processes if in one."""


def together(work: Callable[[], _Value], group: Any) -> _Value:
    """What ``work()`` returns; a collective call.

    Raises:
        CheckpointError: in all processes, if it failed in one.
    """
    value, failed, cause = None, None, None
    try:
        value = work()
    except (Exception, _torch_error()) as error:
        failed, cause = str(error) if isinstance(error, CheckpointError) else _said(error, group), error
    failures = [(rank, each) for rank, each in enumerate(everyone(failed, group)) if each is not None]
    if failures:
        rank, message = failures[0]
        where = "" if group is None or len(failures) == torch.distributed.get_world_size(group) else f" (rank {rank})"
        raise CheckpointError(f"{message}{where}") from cause
    return value  # type: ignore[return-value]


def _torch_error() -> type[BaseException]:
    from torch.distributed.checkpoint import CheckpointException

    return CheckpointException  # no Exception


def _said(error: BaseException, group: Any) -> str:
    """An error in a line; torch's of several processes, which all of them raise, as the first of them."""
    where = ""
    if isinstance(error, _torch_error()):
        failures = error.failures  # type: ignore[attr-defined]
        rank, (error, _) = next(iter(failures.items()))
        where = f" (rank {rank})" if group is not None else ""
    error = of_system(error) or error
    return f"{type(error).__name__}: {error}{where}"


def _as_bytes(rest: Mapping[str, Any]) -> bytes:
    """What is no tensor, as it lies in the file.

    Raises:
        CheckpointError: for objects of classes that reading could only make by running their code.
    """
    written = io.BytesIO()
    torch.save(dict(rest), written)
    try:
        torch.load(io.BytesIO(written.getvalue()), weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"a checkpoint holds numbers, strings, tensors, lists, tuples and dicts alone; got a {_class_in(error)}"
        ) from error
    return written.getvalue()


def write(folder: Path, tensors: dict[str, Tensor], rest: Mapping[str, Any], group: Any) -> None:
    """Write a checkpoint, or replace one; a collective call.

    Args:
        folder: on a file system that all processes share.
        tensors: by name. What several processes have under one name must be equal, and is written once.
        rest: what is no tensor; that of the first process.
        group: None for one process.
    """
    from torch.distributed import checkpoint

    first = group is None or torch.distributed.get_rank(group) == 0
    name = everyone(f"tensors-{secrets.token_hex(4)}", group)[0]
    together(lambda: _as_bytes(rest), group)  # what cannot be saved is refused before anything is written
    beside = folder.with_name(f".{folder.name}{PARTIAL}")
    place = everyone(together(lambda: _prepare(folder, beside) if first else folder, group), group)[0]
    writer = checkpoint.FileSystemWriter(place / name)
    with _quietly(group):
        together(
            lambda: checkpoint.save(tensors, storage_writer=writer, process_group=group, no_dist=group is None), group
        )
    checksums = _of_all(together(lambda: _own_checksums(place / name, group), group), group)
    together(lambda: _finish(folder, place, name, rest, checksums) if first else None, group)


def _own_checksums(folder: Path, group: Any) -> dict[str, int]:
    """Of the files that this process has written, by name."""
    rank = 0 if group is None else torch.distributed.get_rank(group)
    return {path.name: checksum(path) for path in folder.glob(f"__{rank}_*")}


def _of_all(checksums: dict[str, int], group: Any) -> dict[str, int]:
    return {name: found for each in everyone(checksums, group) for name, found in each.items()}


def _prepare(folder: Path, beside: Path) -> Path:
    """Where to write, without what an interrupted process has left there."""
    if beside.exists():
        shutil.rmtree(beside)
    if folder.exists():
        if not _is_checkpoint(folder):
            raise CheckpointError(f"{folder} exists and is no checkpoint: name another folder")
        _clear(folder, Stored(folder).tensors.name)
        return folder
    beside.mkdir(parents=True)
    return beside


def _clear(folder: Path, kept: str) -> None:
    for old in folder.glob("tensors-*"):
        if old.name != kept:
            shutil.rmtree(old)


def _finish(folder: Path, place: Path, name: str, rest: Mapping[str, Any], checksums: dict[str, int]) -> None:
    from torch.distributed.checkpoint import FileSystemReader

    stored = FileSystemReader(place / name).read_metadata().storage_data
    files = {item.relative_path for item in stored.values()}
    if missing := sorted(file for file in files if not (place / name / file).is_file()):
        raise CheckpointError(
            f"{folder}: other processes wrote {', '.join(missing)} elsewhere; the folder must be on a file system that "
            "all processes share"
        )
    for file in {*files, _LIST} - checksums.keys():
        checksums[file] = checksum(place / name / file)
    written = _as_bytes({**rest, "format": FORMAT, "folder": name, "checksums": checksums})
    sync(place / name)
    with replaced(place / _REST) as file:
        file.write(written)
    if place == folder:
        _clear(folder, name)
    else:
        os.replace(place, folder)
        sync(folder.parent)


@contextmanager
def _quietly(group: Any) -> Iterator[None]:
    """Without torch's warning that it is alone, where it was told so."""
    with warnings.catch_warnings():
        if group is None:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _is_checkpoint(folder: Path) -> bool:
    return (folder / _REST).is_file()


class Stored:
    """A complete checkpoint in a folder.

    torch.distributed.checkpoint unpickles its own list of tensors: read checkpoints that you trust. Checksums of all
    files are compared before that. A checkpoint of a version without checksums is read with a warning.

    Attributes:
        rest: what is no tensor.
        tensors: the folder with the tensors.
        forms: size and dtype of each tensor by name.

    Raises:
        CheckpointError: if there is none, or it is of another format or damaged.
    """

    def __init__(self, folder: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        if not _is_checkpoint(folder):
            raise CheckpointError(
                f"{folder}: {'not a checkpoint of LocalStep' if folder.exists() else 'there is no such checkpoint'}"
            )
        self._folder = folder
        with readable(folder, CheckpointError):
            self.rest = load_checked(folder / _REST)
            found = self.rest.get("format")
        if found != FORMAT:
            raise CheckpointError(
                f"{folder}: expected a checkpoint of format {FORMAT}, found {found}: another version wrote it"
            )
        with readable(folder, CheckpointError):
            self._checksums: dict[str, int] | None = self.rest.get("checksums")
            self.tensors = folder / Path(self.rest["folder"]).name
            self._compare([_LIST])
            listed = FileSystemReader(self.tensors).read_metadata().state_dict_metadata
            tensors = {name: item for name, item in listed.items() if isinstance(item, TensorStorageMetadata)}
            self.forms = {name: (item.size, item.properties.dtype) for name, item in tensors.items()}

    def _compare(self, files: list[str]) -> None:
        if self._checksums is None:
            return
        for file in files:
            if checksum(self.tensors / file) != self._checksums[file]:
                raise changed(file)

    def read(self, tensors: dict[str, Tensor], group: Any) -> None:
        """Fill ``tensors``, by name; a collective call.

        Raises:
            CheckpointError: in all processes, if a file is damaged, before anything is filled.
        """
        from torch.distributed import checkpoint

        rank, size = 0, 1
        if group is not None:
            rank, size = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
        if self._checksums is None and rank == 0:
            warnings.warn(f"{self._folder} has no checksums, and is not checked for damage", stacklevel=2)

        def compare() -> None:
            with readable(self._folder, CheckpointError):
                self._compare(sorted(self._checksums or ())[rank::size])  # each file is read by one process

        together(compare, group)
        reader = checkpoint.FileSystemReader(self.tensors)
        with _quietly(group):
            together(
                lambda: checkpoint.load(tensors, storage_reader=reader, process_group=group, no_dist=group is None),
                group,
            )


def _class_in(error: BaseException) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return reason(error) if found is None else found[1]

"""One process at a time writes in a run folder."""

from __future__ import annotations

import errno
import os
import socket
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import SettingsError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_NAME = ".lock"
_held: set[str] = set()  # by this process: a record lock does not keep a process from itself


class RunLock:
    """While entered, no other process can enter the lock of the same run folder, which is made if it is missing.

    It is a record lock of the system on ``.lock``: it ends with the process, however that ends, and forked processes
    do not inherit it, so workers that outlive a killed run do not hold it. On Windows, which has none, it does nothing.

    Raises:
        SettingsError: if the folder is in use, or cannot be made or written.
    """

    def __init__(self, output: Path) -> None:
        self._output, self._path = output, output / _NAME
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        try:
            self._output.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise SettingsError(unusable(self._output, "cannot be made", error)) from error
        if fcntl is not None:
            try:
                while self._handle is None:
                    self._handle = self._locked()
            except OSError as error:
                raise SettingsError(unusable(self._output, "cannot be written", error)) from error
            _held.add(self._key)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is None:
            return
        _held.discard(self._key)
        self._path.unlink(missing_ok=True)  # before others can lock it; who has it open finds it gone
        os.close(self._handle)
        self._handle = None

    @property
    def _key(self) -> str:
        return os.path.realpath(self._path)

    def _locked(self) -> int | None:
        """The locked file; None if it was deleted meanwhile by the process that had it before."""
        if self._key in _held:
            raise SettingsError(_in_use(self._output, "this process"))
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    holder = os.read(handle, 200).decode(errors="replace").strip() or "another process"
                    raise SettingsError(_in_use(self._output, holder)) from error
                warnings.warn(
                    f"{self._output} is not locked ({error.strerror}): start no second process with this --output",
                    stacklevel=4,
                )
            if not _same_file(handle, self._path):
                os.close(handle)
                return None
            os.truncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        except BaseException:
            os.close(handle)
            raise
        return handle


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def refuse_used(output: Path) -> None:
    """SettingsError if another process is writing in this run folder."""
    if (output / _NAME).exists():
        with RunLock(output):
            pass


def _in_use(output: Path, holder: str) -> str:
    return f"{output} is in use by {holder}: wait for it, stop it, or choose another --output"


def unusable(output: Path, how: str, error: Any) -> str:
    """The message for a run folder that cannot be made or written."""
    return f"--output {output}: this folder {how}: {getattr(error, 'strerror', None) or error}; choose another"

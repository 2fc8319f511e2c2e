"""Objects of earlier builds, which are linked again while all that went into them is the same. Standard library alone.

What goes into an object is in its name: a digest of its source, the headers of csrc which that includes, flags,
compilers and torch's headers. Places and times are not, because each `pip install .` brings a torch of its own in a
temporary folder. A file begins with the digest of the rest, so that a damaged one is not taken for an object.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DAYS = 30  # without use, after which an object is deleted

# What of torch's headers the sources include.
STABLE_HEADERS = ("torch/csrc/stable", "torch/headeronly", "torch/csrc/inductor/aoti_torch")
# Compilers read these themselves, or torch and setuptools do.
VARIABLES = (
    *("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "CPATH", "C_INCLUDE_PATH", "CPLUS_INCLUDE_PATH"),
    *("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN", "CL", "_CL_"),
)


class Objects:
    """Objects kept in ``folder``, each under its key."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def lock(self) -> Any:
        """Wait until no other process builds in this folder. Whoever holds what is returned keeps others waiting."""
        try:
            import fcntl

            self.folder.parent.mkdir(parents=True, exist_ok=True)
            file = open(self.folder.with_suffix(".lock"), "w")
            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print("auglocal_ext: waiting for another build in this folder", flush=True)
                fcntl.lockf(file, fcntl.LOCK_EX)
        except (ImportError, OSError):  # Windows, or a file system without locks
            return None
        return file

    def take(self, key: str, to: Path) -> bool:
        """Write the object of this key to the file ``to``; False where there is none that is whole."""
        kept = self.folder / key
        try:
            content = kept.read_bytes()
        except OSError:
            return False
        digest, content = content[:32], content[32:]
        if hashlib.sha256(content).digest() != digest:
            return False
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_bytes(content)
        with contextlib.suppress(OSError):
            os.utime(kept)
        return True

    def keep(self, key: str, file: Path) -> None:
        """Keep a finished object. It gets its name when it is written, so no half of one is ever found."""
        part = None
        try:
            content = file.read_bytes()
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".part-", delete=False) as out:
                part = Path(out.name)
                out.write(hashlib.sha256(content).digest() + content)
            part.replace(self.folder / key)
        except OSError as error:  # a full disk: the next build compiles again
            print(f"auglocal_ext: {file.name} is not kept for the next build: {error}", flush=True)
            if part is not None:
                part.unlink(missing_ok=True)

    def prune(self) -> None:
        """Delete what no build has used for long."""
        oldest = time.time() - DAYS * 86400
        for kept in self.folder.glob("*"):
            with contextlib.suppress(OSError):
                if kept.stat().st_mtime < oldest:
                    kept.unlink()


def key(source: Path, root: Path, made_with: Any) -> str:
    """Name of the object of ``source``; ``made_with`` is all else that goes into it, JSON-compatible."""
    files = {path.relative_to(root).as_posix(): _digest([path]) for path in with_headers(source, root)}
    return hashlib.sha256(json.dumps([files, made_with], sort_keys=True).encode()).hexdigest()


def with_headers(source: Path, root: Path) -> list[Path]:
    """``source`` and the headers below ``root`` that it includes, directly or not.

    An #include that the preprocessor would skip counts too.
    """
    found, rest = set(), [source.resolve()]
    root = root.resolve()
    while rest:
        path = rest.pop()
        if path in found or not path.is_file() or root not in path.parents:
            continue
        found.add(path)
        # A name may also stand in a #define, for an #include of the macro.
        pattern = r'^\s*#\s*(?:include|define\s+\w+)\s*"([^"]+)"'
        names = re.findall(pattern, path.read_text(errors="replace"), re.MULTILINE)
        rest += [(path.parent / name).resolve() for name in names]
    return sorted(found)


def headers_digest(include: Path) -> str:
    """Digest of torch's headers in ``include``, as far as ours include them."""
    return _digest(path for name in STABLE_HEADERS for path in sorted((include / name).rglob("*.h")))


def environment() -> dict[str, str]:
    """What the compilers read from the environment."""
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def placeless(value: Any, places: dict[str, str]) -> Any:
    """``value`` with each of these paths, in any text of it, by its name: ``{"/tmp/a1b2/include": "torch"}``."""
    text = json.dumps(value)
    for place, name in sorted(places.items(), key=lambda item: -len(item[0])):
        text = text.replace(json.dumps(place)[1:-1], f"<{name}>")
    return json.loads(text)


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()

"""Identity of the C++ and CUDA sources. The build reads this file too, so it imports the standard library alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = (".h", ".cpp", ".cu")


def sources_hash(folder: Path) -> str:
    """Digest of the sources below ``folder``: names and contents, independent of time and place."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]

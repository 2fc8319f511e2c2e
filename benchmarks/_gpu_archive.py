"""Everything below a folder as few archives of a bounded size, the most important files in the first."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

LEFT_OUT = "left-out.txt"
NOT_PACKED = ("site", "cache")  # folders that are made anew
LAST = (".pt",)


def write_archives(
    folder: Path, target: Path, name: str, most_bytes: int = 15 << 20, most_archives: int = 4
) -> list[Path]:
    """``name.tar.gz``, ``name-2.tar.gz``, ... in ``target``; files that do not fit are named in ``left-out.txt``.

    ``most_bytes`` bounds what goes in, so an archive is no larger. Checkpoints come last. Files of an earlier call
    with the same name are replaced.
    """
    packed: list[list[Path]] = [[]]
    sizes, left_out = [0], list[str]()
    for path in _files(folder):
        size = path.stat().st_size + 1024
        fits = [i for i, used in enumerate(sizes) if used + size <= most_bytes]
        if not fits and size <= most_bytes and len(packed) < most_archives:
            packed.append([])
            sizes.append(0)
            fits = [len(packed) - 1]
        if not fits:
            left_out.append(f"{path.relative_to(folder)}: {path.stat().st_size} bytes")
            continue
        packed[fits[0]].append(path)
        sizes[fits[0]] += size
    target.mkdir(parents=True, exist_ok=True)
    written = []
    for number, paths in enumerate(packed, 1):
        archive = target / f"{name}{'' if number == 1 else f'-{number}'}.tar.gz"
        _write(archive, folder, paths, left_out if number == 1 else [])
        written.append(archive)
    return written


def _files(folder: Path) -> list[Path]:
    """In order of importance: summaries and results, logs, what is needed to go on, checkpoints."""
    found = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.suffix != ".partial"
        if not any(part in NOT_PACKED for part in path.relative_to(folder).parts)
    ]
    order = {"results": 1, "logs": 2}
    parts = {path: path.relative_to(folder).parts for path in found}
    return sorted(
        found,
        key=lambda p: (0 if len(parts[p]) == 1 else 4 if p.suffix in LAST else order.get(parts[p][0], 3), parts[p]),
    )


def _write(archive: Path, folder: Path, paths: Sequence[Path], left_out: Sequence[str]) -> None:
    partial = archive.with_name(f"{archive.name}.partial")
    with tarfile.open(partial, "w:gz", compresslevel=6) as tar:
        for path in paths:
            tar.add(path, arcname=str(path.relative_to(folder)), recursive=False)
        if left_out:
            text = ("\n".join(left_out) + "\n").encode()
            info = tarfile.TarInfo(LEFT_OUT)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text))
    partial.replace(archive)

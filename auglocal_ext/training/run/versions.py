"""Which software a run was made with."""

from __future__ import annotations

import platform
from importlib import metadata

from ..._version import __version__


def versions() -> dict[str, str | None]:
    """Versions of this package, Python, and the packages that touch the numbers; None for a missing one."""
    found: dict[str, str | None] = {"auglocal_ext": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "torchvision", "numpy", "pillow"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found

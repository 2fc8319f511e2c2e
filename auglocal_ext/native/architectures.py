"""Which GPUs run code that was compiled for given architectures. The build reads this file too, so it imports the
standard library alone.

A target is named as nvcc names it: ``sm_90`` is machine code (a cubin), ``compute_90`` PTX, which the driver compiles
for the GPU at hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

# GPUs of systems on a chip. Machine code of other GPUs does not run on them, nor theirs elsewhere, whatever the minor
# number says.
INTEGRATED = {(5, 3), (6, 2), (7, 2), (8, 7), (10, 1)}


def targets(flags: Iterable[str]) -> list[str]:
    """What ``-gencode=arch=...,code=...`` flags of nvcc put into a library, PTX last."""
    found = [target for flag in flags for target in re.findall(r"\bcode=((?:sm|compute)_\w+)", flag)]
    return sorted(found, key=lambda target: (target.startswith("compute_"), len(target), target))


def runs(target: str, capability: tuple[int, int]) -> bool:
    """Whether code for ``target`` runs on a GPU of this compute capability."""
    parts = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", target)
    if parts is None:
        raise ValueError(f"expected a target such as sm_90, sm_90a or compute_90, got {target!r}")
    kind, major, minor, feature = parts.groups()
    built = int(major), int(minor)
    if feature == "a":  # of this architecture alone
        return capability == built
    if kind == "compute" and not feature:
        return capability >= built
    if {capability, built} & INTEGRATED:
        return capability == built
    return capability[0] == built[0] and capability[1] >= built[1]


def from_ptx(built_for: Iterable[str], capability: tuple[int, int]) -> bool:
    """Whether a GPU of this compute capability runs PTX of the library, because no machine code in it fits."""
    fitting = [target for target in built_for if runs(target, capability)]
    return bool(fitting) and all(target.startswith("compute_") for target in fitting)


def misfit(built_for: Iterable[str], capability: tuple[int, int], ptx_needs: int, driver: int) -> str | None:
    """Why a library built for these targets does not run on a GPU of this compute capability, or None where it does.

    A driver compiles PTX of toolkits up to its own CUDA version: ``ptx_needs`` is the one that made the library,
    ``driver`` the driver's, both as 1000 major + 10 minor.
    """
    fitting = [target for target in built_for if runs(target, capability)]
    own = f"TORCH_CUDA_ARCH_LIST={capability[0]}.{capability[1]}"
    if not fitting:
        return (
            f"its compute capability is {capability[0]}.{capability[1]}, the library was built for "
            f"{', '.join(built_for)}; build with {own}"
        )
    if driver < ptx_needs and from_ptx(fitting, capability):
        return (
            f"for its compute capability {capability[0]}.{capability[1]} the library has {fitting[-1]} alone, which "
            f"takes a driver for CUDA {dotted(ptx_needs)}, and this one goes up to {dotted(driver)}; "
            f"update the driver or build with {own}"
        )
    return None


def dotted(version: int) -> str:
    """13020 -> "13.2"."""
    return f"{version // 1000}.{version % 1000 // 10}"

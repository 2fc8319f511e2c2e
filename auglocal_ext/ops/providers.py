"""Which implementation of an op runs: one table per op, the automatic choice, and the reason for what is missing.

Providers: ``reference`` (the formula in plain PyTorch) and ``aten`` (the op's memory with torch's own kernels), always
there where an op has them; ``cpu`` and ``cuda`` (the compiled libraries) and ``triton``.
A call's ``provider=`` wins over the environment variable ``AUGLOCAL_PROVIDER``, which wins over the automatic choice.
What is asked for by name and missing raises with the recorded reason; the automatic choice takes the next one in
silence. ``choose`` knows the fixed order alone; ``tuning.py`` lets measurements decide. Compiled code keeps the choice
made when it was traced.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch

from .. import native
from .._torch import constant_when_compiled

NAMES = ("reference", "aten", "cpu", "cuda", "triton")
ENVIRONMENT = "AUGLOCAL_PROVIDER"

LOW = frozenset({torch.float16, torch.bfloat16})
SINGLE = LOW | {torch.float32}
ALL = SINGLE | {torch.float64}


@dataclass(frozen=True)
class Provider:
    """One row of an op's table: the devices (None: every one) and the dtypes of the feature map it serves."""

    name: str
    devices: tuple[str, ...] | None
    dtypes: frozenset[torch.dtype]

    def serves(self, device: str) -> bool:
        return self.devices is None or device in self.devices


@dataclass(frozen=True)
class Table:
    """The providers of one op, the preferred ones first."""

    op: str
    providers: tuple[Provider, ...]

    def row(self, name: str) -> Provider:
        for provider in self.providers:
            if provider.name == name:
                return provider
        raise ValueError(f"{self.op} has no provider {name!r}; it has {', '.join(p.name for p in self.providers)}")


TABLES: dict[str, Table] = {}


def register(table: Table) -> Table:
    """Make an op's table known to ``python -m auglocal_ext info``."""
    TABLES[table.op] = table
    return table


def missing(name: str, device: torch.device | str | None = None) -> str | None:
    """Why a provider cannot be used here, or on this device, or None where it can."""
    reason = _REASONS[name]()
    if reason is not None or name != "cuda" or device is None:
        return reason
    if isinstance(device, str):
        device = torch.device(device)
    return native.device_reason(device) if device.type == "cuda" else None


def available(name: str, device: torch.device | str | None = None) -> bool:
    """Whether a provider can be used here, or on this device."""
    return missing(name, device) is None


def interpreted() -> bool:
    """Whether Triton runs its kernels in its interpreter, and therefore on CPU tensors (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@lru_cache(maxsize=None)
def _triton_missing() -> str | None:
    try:
        import triton  # noqa: F401
        import triton.language  # noqa: F401
    except Exception as error:
        return f"triton cannot be imported ({type(error).__name__}: {error}); install it with `pip install triton`"
    return None


_REASONS: dict[str, Callable[[], str | None]] = {
    "reference": lambda: None,
    "aten": lambda: None,
    "cpu": lambda: native.reason("cpu"),
    "cuda": lambda: native.reason("cuda"),
    "triton": _triton_missing,
}


@constant_when_compiled
def choose(op: str, device: torch.device | str, dtype: torch.dtype, requested: str | None = None) -> str:
    """Name of the provider that runs ``op`` for a feature map on this device and of this dtype, in the fixed order.

    GPUs of one machine may differ in what runs on them, so the device counts, not its type alone.

    Raises ValueError for an unknown provider or one that does not serve the device, TypeError for a dtype it does not
    take, RuntimeError (with the recorded reason) where it is missing.
    """
    if isinstance(device, str):
        device = torch.device(device)
    found = by_name(op, device, requested)
    if found is not None:
        return _explicit(TABLES[op], device, dtype, *found)
    for name in _usable(op, device, dtype):
        return name
    raise TypeError(f"{op}: no provider takes {dtype} on {device}; expected a floating-point feature map")


def by_name(op: str, device: torch.device, requested: str | None) -> tuple[str, str] | None:
    """The provider that is asked for by name, and what asks for it; None where the choice is automatic."""
    if requested is not None:
        return requested, f"provider={requested!r}"
    preferred = os.environ.get(ENVIRONMENT, "auto")
    if preferred in ("", "auto"):
        return None
    if preferred not in NAMES:
        raise ValueError(f"{ENVIRONMENT}={preferred!r}: expected auto, {', '.join(NAMES)}")
    # The variable speaks for every tensor of the program: where its provider does not serve a device, as with cuda for
    # a CPU tensor, it has no opinion.
    serves = any(p.name == preferred and p.serves(device.type) for p in TABLES[op].providers)
    return (preferred, f"{ENVIRONMENT}={preferred}") if serves else None


def asked() -> object:
    """Of what ``AUGLOCAL_PROVIDER`` holds, something to compare with what it held before; asked at every call of an op.

    ``os.environ.get`` raises and catches an error where nothing is set, which takes longer than the rest of a choice.
    """
    variables = getattr(os.environ, "_data", None)  # the dictionary inside, as it is in CPython
    return os.environ.get(ENVIRONMENT) if variables is None else variables.get(_key)


_key: object = getattr(os.environ, "encodekey", str)(ENVIRONMENT)


def rivals(op: str, device: torch.device, dtype: torch.dtype) -> list[str]:
    """The providers among which a measurement decides, in the fixed order.

    The reference is what results are compared with, and Triton's interpreter is for tests.
    """
    left_out = {"reference", "triton"} if device.type == "cpu" else {"reference"}
    return [name for name in _usable(op, device, dtype) if name not in left_out]


def _usable(op: str, device: torch.device, dtype: torch.dtype) -> Iterator[str]:
    for provider in TABLES[op].providers:
        if provider.serves(device.type) and dtype in provider.dtypes and available(provider.name, device):
            yield provider.name


def _explicit(table: Table, device: torch.device, dtype: torch.dtype, name: str, origin: str) -> str:
    provider = table.row(name)
    reason = missing(name, device)
    if reason is not None:
        raise RuntimeError(f"{table.op}: {origin} was asked for, but it is not available here: {reason}")
    if not provider.serves(device.type):
        raise ValueError(
            f"{table.op}: {origin} serves tensors on {' or '.join(provider.devices or ())}, got one on {device}; "
            "move the tensor or leave the choice automatic"
        )
    if dtype not in provider.dtypes:
        takes = ", ".join(sorted(str(d).removeprefix("torch.") for d in provider.dtypes))
        raise TypeError(f"{table.op}: {origin} takes {takes}, got {dtype}; convert it or use provider='reference'")
    return name

"""What is wrong with the value of one setting that its type and its bounds do not say; None where nothing is."""

from __future__ import annotations

from itertools import pairwise

import torch

from ...planning.memory import parse_bytes
from .language_models import check_network


def network(name: str) -> str | None:
    """Of the name of a network."""
    try:
        check_network(name)
    except ValueError as error:
        return f"names no network: {error}"
    return None


def memory_budget(text: str) -> str | None:
    """Of a number of bytes."""
    try:
        parse_bytes(text)
    except ValueError:
        return f"must be bytes, such as 400MB (1 MB = 1e6 bytes) or 0.4GiB (1 GiB = 2**30 bytes), got {text!r}"
    return None


def device(name: str) -> str | None:
    """Of a device's name, whether or not there is such a one here."""
    try:
        known = name == "auto" or torch.device(name).type in ("cpu", "cuda")
    except RuntimeError:
        known = False
    return None if known else f"is auto, cpu, cuda or cuda:<index>, not {name!r}"


def modules(value: int | tuple[int, ...]) -> str | None:
    """Of a number of local modules, or of the last layer of each but the last."""
    if isinstance(value, int):
        return None if value >= 1 else f"must be at least 1, got {value}"
    return None if _ascending(value, 0) else f"must be ascending indices of layers, counted from 0, got {value}"


def stage_cuts(value: tuple[int, ...]) -> str | None:
    """Of the first local module of each stage but the first."""
    return None if _ascending(value, 1) else f"must be ascending numbers of local modules, from 1 on, got {value}"


def momentum(value: float) -> str | None:
    """Of Nesterov's momentum."""
    return None if 0 < value < 1 else f"must lie between 0 and 1, got {value}"


def mean(value: tuple[float, ...]) -> str | None:
    """Of the means of an image's channels."""
    return None if len(value) == 3 else f"must be three numbers, one per colour in units of 0..255, got {value}"


def std(value: tuple[float, ...]) -> str | None:
    """Of the standard deviations of an image's channels."""
    if len(value) == 3 and min(value) > 0:
        return None
    return f"must be three numbers above 0, one per colour in units of 0..255, got {value}"


def _ascending(value: tuple[int, ...], least: int) -> bool:
    return all(each >= least for each in value) and all(a < b for a, b in pairwise(value))

"""Parameters, losses and gradients are those that were recorded, to 1e-12 in float64."""

from __future__ import annotations

import json

import pytest
from parity import CASES, TABLE, measured

RECORDED = json.loads(TABLE.read_text())


def differences(found, expected, path=""):
    """Where two nested records differ, and by how much."""
    if isinstance(expected, dict):
        if set(found) != set(expected):
            return [f"{path}: {sorted(set(found) ^ set(expected))} is in one alone"]
        return [line for key in expected for line in differences(found[key], expected[key], f"{path}/{key}")]
    if isinstance(expected, list):
        if len(found) != len(expected):
            return [f"{path}: {found} instead of {expected}"]
        pairs = zip(found, expected, strict=True)
        return [line for i, pair in enumerate(pairs) for line in differences(*pair, f"{path}[{i}]")]
    same = abs(found - expected) <= 1e-12 * (1 + abs(expected)) if isinstance(expected, float) else found == expected
    return [] if same else [f"{path}: {found!r} instead of {expected!r}"]


def test_the_table_holds_every_configuration():
    assert set(RECORDED) == set(CASES) and len(CASES) >= 20


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_the_recorded_ones(name):
    assert not differences(measured(name), RECORDED[name])

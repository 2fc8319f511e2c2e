"""Every test that has a provider as a parameter is skipped where that provider, or its dtype, cannot be had."""

from __future__ import annotations

import column
import pytest


@pytest.fixture(autouse=True)
def _needed(request: pytest.FixtureRequest) -> None:
    parameters = getattr(getattr(request.node, "callspec", None), "params", {})
    if "provider" in parameters:
        column.need(parameters.get("device", "cpu"), parameters["provider"])
        if "dtype" in parameters:
            column.serves(request.module.OP, parameters["provider"], parameters["dtype"])

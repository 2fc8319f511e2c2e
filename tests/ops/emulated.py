"""pytest plugin: the cuda provider of an op on CPU tensors, its .cu compiled for the host by ``emulator/``.

``python -m pytest -p emulated`` with this folder on the module path; ``AUGLOCAL_EMULATED`` names the folder of the
libraries. Each test runs with a seed of its own, and fails where the emulator's detectors have found something.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import column
import pytest
import torch
from emulator import build, reports

from auglocal_ext.ops import providers

FOLDER = "AUGLOCAL_EMULATED"

if FOLDER in os.environ:
    _folder = Path(os.environ[FOLDER])
    runtime = build.load_runtime(_folder)
    if not runtime.address_sanitizer:
        runtime.serve_torch()
        runtime.detect_races(True)
    for _op in build.compiled_ops():
        torch.ops.load_library(str(_folder / f"{_op}.so"))
    providers._REASONS["cuda"] = lambda: None
    for name, table in providers.TABLES.items():
        rows = tuple(replace(row, devices=("cpu",)) if row.name == "cuda" else row for row in table.providers)
        providers.TABLES[name] = replace(table, providers=rows)
    column.CASES[:] = [pytest.param("cpu", "cuda", id="cpu-cuda")]

    @pytest.fixture(autouse=True)
    def _reports(request: pytest.FixtureRequest) -> Iterator[None]:
        runtime.set_seed(zlib.crc32(request.node.nodeid.encode()))
        yield
        found = reports.taken(runtime)
        assert not found, "\n".join(found)

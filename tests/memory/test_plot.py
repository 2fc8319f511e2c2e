"""The figure is written, also without a display and without a timeline."""

from __future__ import annotations

import sys

import pytest

from auglocal_ext.memory import PlotRow, plot_memory

ROWS = [
    PlotRow("BP", 8_700_000_000, "#8a94a0", timeline=[(0, 0), (50, 8_700_000_000), (100, 0)], emphasis=True),
    PlotRow("AugLocal", 700_000_000, "#d1495b", other_bytes=1.7e9),
]


def test_png_is_written(tmp_path):
    panels = [("one", ROWS), ("two", ROWS[:1])]
    path = plot_memory(panels, tmp_path / "new" / "memory.png", title="Memory", other_label="paper")
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        plot_memory([("empty", [])], tmp_path / "memory.png", title="Memory")


def test_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        plot_memory([("one", ROWS)], tmp_path / "memory.png", title="Memory")

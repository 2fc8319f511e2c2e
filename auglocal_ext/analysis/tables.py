"""Results as text: CSV files that grow run by run, and tables for the terminal."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

SHOWN = 20
"""Layers a table or an axis names at most; the others are left out evenly."""


class Table:
    """A CSV file with a header, in the place of any older one; rows are on the disk when :meth:`add` returns."""

    def __init__(self, path: Path, columns: Sequence[str]):
        self.path, self._columns = path, tuple(columns)
        self._write("w", [self._columns])

    def add(self, rows: Iterable[Sequence[object]]) -> None:
        """Appends rows of one value per column; floats keep all their digits, a float that is nan is ``nan``."""
        rows = list(rows)
        for row in rows:
            if len(row) != len(self._columns):
                raise ValueError(f"expected {len(self._columns)} values ({', '.join(self._columns)}), got {row!r}")
        self._write("a", rows)

    def _write(self, mode: str, rows: Iterable[Sequence[object]]) -> None:
        with self.path.open(mode, newline="") as file:
            csv.writer(file).writerows(rows)


def thinned(count: int, most: int = SHOWN) -> list[int]:
    """Every n-th index of ``range(count)`` and the last one, ``most`` at most and all where that is enough."""
    step = max(1, -(-(count - 1) // max(1, most - 1)))
    shown = list(range(0, count, step))
    if shown[-1] != count - 1:
        shown[-1 if count - 1 - shown[-1] < step / 2 else len(shown) :] = [count - 1]
    return shown


def layer_table(names: Mapping[str, Sequence[str]], values: Mapping[str, Sequence[float]], form: str = "{:.3f}") -> str:
    """A line per layer and a column per run; runs of other layers get a table of their own.

    Args:
        names: the layers of each run.
        values: a number for each layer of each run; nan becomes ``-``.
        form: how a number is written.
    """
    tables = []
    for layers in dict.fromkeys(tuple(layers) for layers in names.values()):
        runs = [run for run in values if tuple(names[run]) == layers]
        lines = [["layer", *runs]]
        for i in thinned(len(layers)):
            lines.append([layers[i], *(number(values[run][i], form) for run in runs)])
        tables.append(aligned(lines))
    return "\n\n".join(tables)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Cells in columns: the first one to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(n) for cell, n in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def number(value: float, form: str) -> str:
    """``value`` in ``form``, such as ``"{:.3f}"``; a dash for nan."""
    return "-" if math.isnan(value) else form.format(value)

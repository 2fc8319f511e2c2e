"""The table of ``benchmarks/accuracy.py`` as Markdown, for the terminal and for ``accuracy.md``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from _accuracy_table import TOLERANCE
from _papers import AUGLOCAL

NONE = "-"


def describe(tables: Iterable[dict[str, Any]]) -> str:
    """All tables, each under its heading, with what has to be said of it below."""
    return "\n\n".join(_section(table) for table in tables) + "\n"


def heading(table: dict[str, Any]) -> str:
    return f"{table['network']}, {table['epochs']} epoch{'s' if table['epochs'] > 1 else ''}"


def conditions(table: dict[str, Any]) -> str:
    """Data, device and settings of a table, in one line."""
    data, images = table["data"], "no data read"
    if data is not None:
        name = table["dataset"] or f"{len(data['classes'])} classes"
        images = f"{name}, {data['train_images']:,} train and {data['test_images']:,} test images"
    return f"{images}; {table['device']}; {table['settings'] or 'no further settings'}"


def _section(table: dict[str, Any]) -> str:
    rows, compared = table["rows"], any(row["paper"] for row in table["rows"])
    columns = ["row", "K", "seeds", "last, %", "best, %", "last - BP", "best - BP"]
    columns += ["paper, %", "paper - BP", "ours - paper's", ""] if compared else []
    columns += ["training, s", "images/s", "peak, GB"]
    cells = [_cells(row, compared) for row in rows]
    parts = [f"## {heading(table)}", conditions(table), _markdown(columns, cells), _notes(table, compared)]
    return "\n\n".join(part for part in parts if part)


def _cells(row: dict[str, Any], compared: bool) -> list[str]:
    cells = [
        row["row"],
        str(row["local_modules"] or NONE),
        str(len(row["seeds"])),
        accuracy(row["last"]),
        accuracy(row["best"]),
        difference(row["last_difference"]),
        difference(row["best_difference"]),
    ]
    if compared:
        paper = row["paper"] or {}
        cells += [
            accuracy({"mean": paper["accuracy"], "deviation": paper["deviation"]} if paper else None),
            _number(paper.get("difference"), "+.2f"),
            _number(row["beside_paper"], "+.2f"),
            "MISSES" if row["misses"] else "holds" if row["beside_paper"] is not None else NONE,
        ]
    peak = row["peak_bytes"]
    return cells + [
        _number(row["train_seconds"], ",.0f"),
        _number(row["images_per_second"], ",.0f"),
        _number(peak / 1e9 if peak else None, ".2f"),
    ]


def accuracy(found: dict[str, Any] | None) -> str:
    """``"91.12 ± 0.24"``; without the deviation where there is none."""
    return NONE if found is None else f"{found['mean']:.2f}" + _deviation(found["deviation"])


def difference(found: dict[str, Any] | None) -> str:
    """``"-2.61 ± 0.20"`` points."""
    return NONE if found is None else f"{found['mean']:+.2f}" + _deviation(found["deviation"])


def _deviation(value: float | None) -> str:
    return "" if value is None else f" ± {value:.2f}"


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths)) + "|"
    return "\n".join([line(columns), rule, *map(line, rows)])


def _notes(table: dict[str, Any], compared: bool) -> str:
    rows = table["rows"]
    notes = [f"{row['row']}, {text}" for row in rows for text in row["not_done"]]
    notes += [f"**{row['row']} misses what is expected**: {text}" for row in rows for text in row["misses"]]
    if compared:
        notes += _about_papers(rows)
    notes.append(
        "K: local modules. Last, best: test accuracy of the last epoch, and of the best one, which is chosen on the "
        "test set; mean and deviation over seeds. Differences in points, to BP of the same seeds."
    )
    if table["device"] == "cpu":
        notes.append("The peak is the process's resident set, images included.")
    notes += [f"Times do not compare: {text}." for text in table["unlike"]]
    return "\n".join(f"- {note}" for note in notes)


def _about_papers(rows: Sequence[dict[str, Any]]) -> list[str]:
    by_source: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["paper"]:
            by_source.setdefault((row["paper"]["source"], row["paper"]["what"]), []).append(row["row"])
    notes = [f"Paper: {name}: {what} ({', '.join(names)})." for (name, what), names in by_source.items()]
    notes.append(
        "Paper - BP is to that paper's own BP; ours - paper's is our best - BP less that, expected within "
        f"{TOLERANCE} points, and AugLocal d=6 within {TOLERANCE} points of BP."
    )
    return notes + _order(rows)


def _order(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whether two rows of AugLocal's table stand here as they do there."""
    known = [row for row in rows if row["paper"] and row["paper"]["source"] == AUGLOCAL.name and row["best"]]
    pairs = [
        sorted(pair, key=lambda row: row["paper"]["accuracy"])
        for pair in combinations(known, 2)
        if pair[0]["paper"]["accuracy"] != pair[1]["paper"]["accuracy"]
    ]
    turned = [(lower, upper) for lower, upper in pairs if lower["best"]["mean"] > upper["best"]["mean"]]
    texts = [
        f"{lower['row']} above {upper['row']} by {lower['best']['mean'] - upper['best']['mean']:.2f} "
        f"(there below by {upper['paper']['accuracy'] - lower['paper']['accuracy']:.2f})"
        for lower, upper in turned
    ]
    if not pairs:
        return []
    return [
        f"Order of the paper's table: {len(pairs) - len(turned)} of {len(pairs)} pairs"
        + "".join(f"; {text}" for text in texts)
        + "."
    ]

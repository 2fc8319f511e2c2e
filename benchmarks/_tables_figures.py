"""The figures in the sentences of README.md and docs/, by name; ``benchmarks/tables.py`` lists the names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from _tables_results import (
    ANALYSES,
    Rows,
    UnknownNameError,
    analysis,
    base_of,
    expect,
    fields,
    image_information,
    kernel_median,
    kernel_span,
    memory_fields,
    network_rows,
    pick,
    read,
    scaling_rows,
    split_dtype,
)


def figure(words: Sequence[str]) -> str:
    """The text of a figure. Raises UnknownNameError."""
    if not words:
        raise UnknownNameError(f"has no name; there are {', '.join(FIGURES)}")
    return pick(FIGURES, words[0], "figure")(words[1:])


def _of_row(rows: Rows, name: str, field: str) -> str:
    row = pick(rows, name, "row")
    return pick(fields(row, base_of(rows, row)), field, "field")


def _memory(words: Sequence[str]) -> str:
    words, dtype = split_dtype(words)
    network, row, field = expect(words, "NETWORK ROW FIELD")
    return pick(pick(memory_fields(network, dtype), row, "row"), field, "field")


def _of_network(source: str) -> Callable[[Sequence[str]], str]:
    def found(words: Sequence[str]) -> str:
        network, row, field = expect(words, "NETWORK ROW FIELD")
        return _of_row(network_rows(source, network), row, field)

    return found


def _of_scaling(over: str) -> Callable[[Sequence[str]], str]:
    def found(words: Sequence[str]) -> str:
        at, row, field = expect(words, f"{over.upper()} ROW FIELD")
        return _of_row(pick(scaling_rows(over), at, over), row, field)

    return found


def _kernels(words: Sequence[str]) -> str:
    op, what = expect([*words, "cpu"] if len(words) == 1 else words, "OP WHAT")
    return kernel_median(what) if op == "median" else kernel_span(op, what)


def _accuracy(words: Sequence[str]) -> str:
    name, field = expect(words, "ROW FIELD")
    (table,) = read("accuracy")["tables"]
    row = pick({row["row"]: row for row in table["rows"]}, name, "row")
    columns = {"last": "last", "best": "best", "last-BP": "last_difference", "best-BP": "best_difference"}
    spread = row[pick(columns, field, "field")]
    if spread is None:
        raise UnknownNameError(f"asks for {field} of {name}, which has none")
    return format(spread["mean"], "+.2f" if field.endswith("-BP") else ".2f").replace("-", "−")


def _analysis(words: Sequence[str]) -> str:
    if list(words) == ["image", "information"]:
        return image_information()
    run, layer, field = expect(words, "RUN LAYER FIELD")
    value = pick(pick(analysis(field), run, "run"), layer, "layer")
    return format(value, ANALYSES[field].digits)


def _command(words: Sequence[str]) -> str:
    (source,) = expect(words, "SOURCE")
    found = read(source)
    command = found["command"] if "command" in found else found["environment"]["command"]
    return f"`{re.sub(r' --output [^ ]+', '', command)}`"


FIGURES: dict[str, Callable[[Sequence[str]], str]] = {
    "memory": _memory,
    "localized": _of_network("localized"),
    "rules": _of_network("rules"),
    "tokens": _of_network("tokens"),
    "tokens-pure": _of_network("tokens-pure"),
    "step": _of_network("step"),
    "depth": _of_scaling("depth"),
    "batch": _of_scaling("batch"),
    "kernels": _kernels,
    "accuracy": _accuracy,
    "analysis": _analysis,
    "command": _command,
}

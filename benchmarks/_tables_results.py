"""The result files that ``benchmarks/tables.py`` reads, and their rows by name."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

RESULTS = Path(__file__).resolve().parent / "results"
GB = 1e9

KERNELS = ("cpu", "compile", "memory")
#: What a marker calls a file.
SOURCES = {
    "memory": "memory-predicted.json",
    "memory-bf16": "bf16/memory-predicted.json",
    "memory-imagenet": "imagenet/memory-predicted.json",
    "backbones": "backbones/memory-predicted.json",
    "localized": "localized/localized-predicted.json",
    "rules": "rules/rules-predicted.json",
    "tokens": "tokens/tokens-predicted.json",
    "tokens-pure": "tokens/pure/tokens-predicted.json",
    "step": "step-cpu.json",
    "scaling": "step-cpu-scaling.json",
    "kernels": "kernels-cpu.json",
    "kernels-static": "kernels-static.json",
    "host": "host-cpu.json",
    "fused-step": "fused-step-cpu.json",
    "accuracy": "accuracy/cpu/accuracy.json",
    "analysis": "analysis/analysis.json",
    "probes": "analysis/probes/analysis.json",
    "scale": "scale/scale.json",
    "shards": "shards/shards.json",
}
#: Files of the same benchmark, for networks that one of them has.
MEMORY = {"fp32": ("memory", "memory-imagenet", "backbones"), "bf16": ("memory-bf16",)}

Rows = dict[str, dict[str, Any]]
T = TypeVar("T")


class UnknownNameError(ValueError):
    """A marker asks for what is not there; the message says what is."""


@dataclass(frozen=True)
class Analysis:
    """Where an analysis lies, and how its values are shown: times ``factor``, with ``digits``."""

    file: str
    column: str
    factor: int
    digits: str


ANALYSES = {
    "cka": Analysis("analysis/cka.csv", "cka", 1, ".2f"),
    "probes": Analysis("analysis/probes/probes.csv", "test_accuracy", 100, ".1f"),
    "information": Analysis("analysis/information.csv", "image_information", 1, ".3f"),
}


@lru_cache(maxsize=None)
def read(source: str) -> dict[str, Any]:
    return json.loads((RESULTS / pick(SOURCES, source, "source")).read_text(encoding="utf-8"))


def pick(known: Mapping[str, T], name: str, what: str) -> T:
    """``known[name]``; UnknownNameError lists the names there are."""
    if name not in known:
        raise UnknownNameError(f"asks for the {what} {name!r}; there are {', '.join(known)}")
    return known[name]


def expect(words: Iterable[str], form: str) -> list[str]:
    """The words, as many as ``form`` has; UnknownNameError otherwise."""
    words = list(words)
    if len(words) != len(form.split()):
        raise UnknownNameError(f"has {len(words)} words after the first; expected {form}")
    return words


def split_dtype(words: Sequence[str]) -> tuple[list[str], str]:
    """The words without a last ``bf16``, and the precision: that, or fp32."""
    return (list(words[:-1]), "bf16") if words[-1:] == ["bf16"] else (list(words), "fp32")


def network_rows(source: str, network: str) -> Rows:
    return {row["name"]: row for row in pick(read(source)["networks"], network, "network")}


def memory_fields(network: str, dtype: str) -> dict[str, dict[str, str]]:
    """Fields of the rows of ``benchmarks/memory.py`` by name, from the file that has the network."""
    source = {name: source for source in MEMORY[dtype] for name in read(source)["networks"]}
    rows = network_rows(pick(source, network, "network"), network)
    digits = 1 if _peak(rows["BP"]) >= 10 * GB else 2
    return {name: fields(row, rows["BP"], digits) for name, row in rows.items()}


def scaling_rows(over: str) -> dict[str, Rows]:
    """Rows by name for each depth, or batch, as text."""
    found: dict[str, Rows] = {}
    for point in read("scaling")["scaling"]:
        if point["over"] == over:
            found.setdefault(str(point["at"]), {})[point["name"]] = point
    return found


def base_of(rows: Rows, row: dict[str, Any]) -> dict[str, Any]:
    """Backpropagation in the precision of a row."""
    found = (rows[name] for name in ("BP", "BP bf16") if name in rows)
    return next(base for base in found if base.get("dtype") == row.get("dtype"))


def fields(row: dict[str, Any], base: dict[str, Any], digits: int = 2) -> dict[str, str]:
    """What a row says, as text by field; shares and ratios are to ``base``, GB have ``digits``.

    Raises UnknownNameError for a row that failed.
    """
    if row.get("error") or row.get("errors"):
        raise UnknownNameError(f"asks for a row that failed: {row['name']}")
    predicted, peak = row.get("predicted") or {}, _peak(row)
    categories = predicted.get("categories") or row.get("predicted_categories") or {}
    values: dict[str, tuple[float | None, str]] = {
        "share": (100 * peak / _peak(base), ".0f"),
        "flops": (predicted["flops"] / base["predicted"]["flops"] if predicted.get("flops") else None, ".2f"),
        "paper": (row.get("paper_gb"), ".2f"),
        "trained": (_millions(row.get("parameters_trained")), ".2f"),
        "deployed": (_millions(row.get("parameters_deployed")), ".2f"),
        "training": (_millions(row.get("macs_training")), ".1f"),
        "inference": (_millions(row.get("macs_inference")), ".1f"),
        "operators": (row.get("counts", {}).get("operators"), ",d"),
        "host_reads": (row.get("counts", {}).get("host_reads"), "d"),
    }
    times = _peak(base) / peak
    texts = {"peak": f"{peak / GB:.{digits}f}", "times": f"{times:.0f}" if times >= 10 else f"{times:.1f}"}
    if "activations and other" in categories:
        texts["activations"] = f"{categories['activations and other'] / GB:.{digits}f}"
        added = categories["activations and other"] + categories.get("gradients", 0)
        texts |= {"adds": f"{added / GB:.{digits}f}", "stays": f"{(peak - added) / GB:.{digits}f}"}
    return texts | {name: format(value, form) for name, (value, form) in values.items() if value is not None}


def _peak(row: dict[str, Any]) -> int:
    return row["predicted"]["peak_bytes"] if row.get("predicted") else row["predicted_peak_bytes"]


def _millions(value: int | None) -> float | None:
    return None if value is None else value / 1e6


def kernel_ratios(what: str) -> dict[str, list[float]]:
    """For each op, over all shapes and dtypes: time or peak memory beside eager PyTorch's.

    ``what`` is "cpu" or "compile", the variant whose time it is, or "memory", the cpu provider's peak. Of an op
    that has no cpu provider it is that of ``aten``.
    """
    pick(dict.fromkeys(KERNELS), what, "comparison")
    variant, value = ("cpu", "peak") if what == "memory" else (what, "time")
    lines: dict[tuple[str, ...], dict[str, float]] = {}
    for line in read("kernels")["results"]:
        if line["error"]:
            raise UnknownNameError(f"asks for a line that failed: {line['op']}, {line['shape']}, {line['variant']}")
        found = line["peak"] if value == "peak" else line["time"]["median"]
        lines.setdefault((line["op"], line["shape"], line["dtype"]), {})[line["variant"]] = found
    ratios: dict[str, list[float]] = {}
    for (op, *_), found in lines.items():
        measured = found["aten"] if variant == "cpu" and "cpu" not in found else found[variant]
        ratios.setdefault(op, []).append(measured / found["eager"])
    return ratios


def kernel_median(what: str) -> str:
    """The median of the ratios of all ops, as text."""
    return f"{median(chain.from_iterable(kernel_ratios(what).values())):.2f}"


def kernel_span(op: str, what: str) -> str:
    """The least and the most of an op's ratios, as text."""
    ratios, digits = pick(kernel_ratios(what), op, "op"), 2 if what == "memory" else 1
    least, most = f"{min(ratios):.{digits}f}", f"{max(ratios):.{digits}f}"
    return least if least == most else f"{least} to {most}"


def host_rows() -> list[dict[str, Any]]:
    """The rows of ``benchmarks/host.py``. Raises UnknownNameError if one failed."""
    rows = read("host")["results"]
    for row in rows:
        if row["error"]:
            raise UnknownNameError(f"asks for a row that failed: {row['name']}")
    return rows


@lru_cache(maxsize=None)
def analysis(which: str) -> dict[str, dict[str, float]]:
    """The values of a CSV file by run and layer; CKA is that with the same layer of the other run."""
    how, found = pick(ANALYSES, which, "analysis"), {}
    for row in _lines(how.file):
        if row.get("reference_layer", row["layer"]) == row["layer"]:
            found.setdefault(row["run"], {})[row["layer"]] = how.factor * float(row[how.column])
    return found


def image_information() -> str:
    """Nats per value that an image holds beyond the mean image: the most that any layer can tell."""
    digits, lines = ANALYSES["information"].digits, _lines(ANALYSES["information"].file)
    (text,) = {format(float(row["blank_error"]) - float(row["perfect_error"]), digits) for row in lines}
    return text


def _lines(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def first_table(name: str) -> str:
    """The table of a Markdown file among the results, as the benchmark has written it."""
    text = (RESULTS / name).read_text(encoding="utf-8")
    return re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)[0].rstrip("\n")

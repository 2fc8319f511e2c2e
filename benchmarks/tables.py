"""Tables and figures of README.md and docs/ from the files under benchmarks/results/.

    python benchmarks/tables.py                              # writes them
    python benchmarks/tables.py --check                      # changes nothing; names what differs

They stand between HTML comments, which no reader sees. A table has lines of its own, a figure is part of a sentence::

    <!-- table: overview -->
    ...
    <!-- /table -->

    AugLocal holds <!-- figure: memory resnet110 "AugLocal d=6" peak -->0.97<!-- /figure --> GB.

A name is words, quoted where one has a space. Tables::

    overview [bf16]                   six ways of training ResNet-32 and ResNet-110: peak and arithmetic
    memory NETWORK... [bf16]          every row of benchmarks/memory.py
    backbones                         the networks of torchvision among those rows
    localized                         every row of benchmarks/memory.py --localized
    rules NETWORK                     every row of benchmarks/memory.py --rules
    tokens                            every row of benchmarks/memory.py for transformers
    counted                           rows of transformers in pure bf16 beside the counts of _token_counts.py
    step                              peaks and operators of benchmarks/step.py, ResNet-32 and ResNet-110
    depth, batch                      peaks over layers of the network, over images of a step
    kernels cpu, kernels static       each op beside eager PyTorch; what machine code tells of the CUDA kernels
    kernels steps                     training steps of fused networks on a CPU, beside eager layers
    kernels host                      what each op costs the host, beside eager layers
    accuracy                          the table of benchmarks/accuracy.py
    analysis cka, probes, information   five runs, a row for each layer
    scale, scale measured             the first table of benchmarks/scale.py, and of it with --measure
    shards                            the table of benchmarks/shards.py
    language                          the table of benchmarks/language.py

Figures, with the names of rows, runs and layers that the result files have::

    memory NETWORK ROW FIELD [bf16]   FIELD: peak (GB), share (percent of BP's peak), times (BP's peak over this one),
    rules NETWORK ROW FIELD           activations (GB within the peak), flops (of BP's), paper (GB), trained and
    step NETWORK ROW FIELD            deployed (M parameters), training and inference (M MACs), operators, host_reads;
    depth LAYERS ROW FIELD            a field that a file does not have is refused
    batch IMAGES ROW FIELD
    localized NETWORK ROW FIELD       adds: GB of activations and gradients within the peak; stays: the rest of it
    tokens NETWORK ROW FIELD
    tokens-pure NETWORK ROW FIELD
    kernels OP [compile | memory]     least and most of eager's time that the cpu provider takes; torch.compile; the
                                      cpu provider's peak memory
    accuracy ROW FIELD                FIELD: last, best, last-BP, best-BP
    analysis RUN LAYER FIELD          FIELD: cka, probes, information
    analysis image information        what there is to know of an image
    command SOURCE                    what wrote a file, without --output; the error of a wrong one lists the sources

Needs no torch. A figure's marker must not begin a line, which Markdown would then take for HTML. In code nothing is a
marker.

Exit status: 0 when all is as it should be, 1 if --check found a difference or a marker is not understood.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from _tables_figures import figure
from _tables_markdown import table
from _tables_results import UnknownNameError

ROOT = Path(__file__).resolve().parents[1]

_CODE_OR_MARKER = re.compile(
    r"^[ ]*(?P<fence>`{3,}|~{3,})[^\n]*\n.*?^[ ]*(?P=fence)"
    r"|(?P<ticks>(?<!`)`+(?!`))(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`)"
    r"|<!--\s*(?P<close>/?)(?P<kind>table|figure)\b\s*:?\s*(?P<name>.*?)\s*-->",
    re.MULTILINE | re.DOTALL,
)
_START_OF_LINE = re.compile(r"[\s>]*([-*+]|\d+[.)])?\s*")


class MarkerError(ValueError):
    """A marker that is not understood; the message names it and its line."""


@dataclass(frozen=True)
class Region:
    """The text between two markers, and what should stand there; ``start`` and ``end`` are places in the page."""

    marker: str
    line: int
    start: int
    end: int
    found: str
    wanted: str


def regions(text: str) -> Iterator[Region]:
    """Every pair of markers of a page, in order. Raises MarkerError."""
    opened: re.Match[str] | None = None
    for match in _CODE_OR_MARKER.finditer(text):
        if match["kind"] is None:
            continue
        if match["close"] and (opened is None or opened["kind"] != match["kind"]):
            raise _error(text, match, f"closes no {match['kind']}")
        if not match["close"]:
            if opened is not None:
                raise _error(text, opened, f"is not closed before {match[0]}")
            opened = match
            continue
        yield _region(text, opened, match)
        opened = None
    if opened is not None:
        raise _error(text, opened, f"is not closed; expected <!-- /{opened['kind']} -->")


def rewrite(text: str) -> str:
    """The page as it should be. Raises MarkerError."""
    parts, at = [], 0
    for region in regions(text):
        parts += [text[at : region.start], region.wanted]
        at = region.end
    return "".join([*parts, text[at:]])


def _region(text: str, opened: re.Match[str], closed: re.Match[str]) -> Region:
    before = text[text.rfind("\n", 0, opened.start()) + 1 : opened.start()]
    try:
        words = shlex.split(opened["name"])
        if opened["kind"] == "table":
            _check_alone(text, opened)
            _check_alone(text, closed)
            wanted = f"\n\n{textwrap.indent(table(words), before)}\n\n{before}"
        else:
            if _START_OF_LINE.fullmatch(before):
                raise _error(text, opened, "begins a line, which Markdown takes for HTML; let a word stand before it")
            wanted = figure(words)
    except UnknownNameError as error:
        raise _error(text, opened, str(error)) from error
    except ValueError as error:
        raise error if isinstance(error, MarkerError) else _error(text, opened, f"cannot be read: {error}") from error
    start, end = opened.end(), closed.start()
    return Region(opened[0], _line(text, opened), start, end, text[start:end], wanted)


def _check_alone(text: str, marker: re.Match[str]) -> None:
    line = text[text.rfind("\n", 0, marker.start()) + 1 :].partition("\n")[0]
    if line.strip() != marker[0]:
        raise _error(text, marker, "shares its line with other text; a table's markers have lines of their own")


def _error(text: str, marker: re.Match[str], what: str) -> MarkerError:
    return MarkerError(f"{_line(text, marker)}: {marker[0]} {what}")


def _line(text: str, match: re.Match[str]) -> int:
    return text.count("\n", 0, match.start()) + 1


def difference(region: Region) -> str:
    """Where a region first differs: what stands there and what should."""
    found, wanted = (text.strip().splitlines() or [""] for text in (region.found, region.wanted))
    for line in range(max(len(found), len(wanted))):
        here, there = (lines[line].strip() if line < len(lines) else "nothing" for lines in (found, wanted))
        if here != there:
            return f"found {here!r}, expected {there!r}"
    return "expected a blank line after the first marker and before the last"


def pages(root: Path) -> list[Path]:
    """README.md and everything below docs/."""
    return [root / "README.md", *sorted((root / "docs").rglob("*.md"))]


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if anything differs")
    check = parser.parse_args(arguments).check
    failures = 0
    for page in pages(root):
        name, text = page.relative_to(root).as_posix(), page.read_text(encoding="utf-8")
        try:
            differing = [region for region in regions(text) if region.found != region.wanted]
        except MarkerError as error:
            print(f"{name}:{error}", file=sys.stderr)
            failures += 1
            continue
        if check:
            failures += len(differing)
            for region in differing:
                print(f"{name}:{region.line}: {region.marker} {difference(region)}", file=sys.stderr)
        elif differing:
            page.write_text(rewrite(text), encoding="utf-8")
            print(f"written: {name}, {len(differing)} changed")
    if failures and check:
        print("python benchmarks/tables.py writes what the result files say", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""What the processes of a run do in a few of its batches: ``schedule.png``, and a table of where their time goes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ... import pictures as style
from ...distributed import Span, StepTimes
from .processes import Alone

_MOST = 16  # rows that fit on a page
_KINDS = {
    "step": ("#2f6f9f", "busy"),
    "waiting": ("#e3b23c", "waits for features"),
    "sending": ("#5fa36a", "sends features"),
    "averaging": ("#d1495b", "waits for the average of gradients"),
}


@dataclass(frozen=True)
class Shares:
    """Seconds of a process's training so far, by what it did; see :class:`auglocal_ext.distributed.StepTimes`.

    ``images`` were spent on making batches, between steps.
    """

    busy: float
    waiting: float
    sending: float
    averaging: float
    images: float

    @classmethod
    def of(cls, times: StepTimes, images: float) -> Shares:
        return cls(times.busy, times.waiting, times.sending, times.averaging, images)


def shares_table(team: Alone, stage_modules: Sequence[range], every: Sequence[Shares]) -> str:
    """A line per process: its stage, replica and local modules, and the percentages of its seconds."""
    head = ("stage", "replica", "modules", "seconds", "busy", "waiting", "sending", "averaging", "images")
    lines: list[tuple[str, ...]] = [head]
    for rank, shares in enumerate(every):
        stage, replica = divmod(rank, team.replicas)
        own = stage_modules[stage]
        values = (shares.busy, shares.waiting, shares.sending, shares.averaging, shares.images)
        whole = sum(values)
        modules = f"{own[0]} to {own[-1]}" if len(own) > 1 else f"{own[0]}"
        cells = [f"{value / whole:.1%}" for value in values]
        lines.append((f"{stage}", f"{replica}", modules, f"{whole:,.1f}", *cells))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def on_common_clock(times: StepTimes) -> list[tuple[int, list[Span]]]:
    """The spans of the last few batches in seconds of the system's clock, which hosts keep alike as well as they do."""
    shift = time.time() - time.monotonic()
    return [(batch, [Span(s.kind, s.start + shift, s.end + shift) for s in spans]) for batch, spans in times.recent]


def record_schedule(path: Path, team: Alone, times: StepTimes, title: str) -> None:
    """Draw the last few batches of all processes, unless the run has its picture already; a collective call."""
    rows = team.everyone(on_common_clock(times))
    if not team.first or path.exists():
        return
    names = [_name(team, *divmod(rank, team.replicas)) for rank in range(team.size)]
    draw_schedule(path, list(zip(names, rows, strict=True)), title)


def _name(team: Alone, stage: int, replica: int) -> str:
    names = [f"stage {stage}"] * (team.stages > 1) + [f"replica {replica}"] * (team.replicas > 1)
    return ", ".join(names)


def draw_schedule(path: Path, rows: Sequence[tuple[str, list[tuple[int, list[Span]]]]], title: str) -> Path:
    """A row of bars for each process, above each other on a common clock; a batch has its number in every row.

    Args:
        rows: a process's name and its batches, as :func:`on_common_clock` has them; the first 16 are drawn.
    """
    from matplotlib.patches import Patch

    shown = rows[:_MOST]
    first = min(span.start for _, batches in shown for _, spans in batches for span in spans)
    figure, ((axes,),) = style.new_figure(1, 1, (11.0, 1.6 + 0.55 * len(shown)))
    for row, (_, batches) in enumerate(shown):
        for batch, spans in batches:
            # The step itself comes last, and lies below what it is made of.
            for span in reversed(spans):
                _bar(axes, row, span, first)
            whole = spans[-1]
            middle = 1000 * ((whole.start + whole.end) / 2 - first)
            axes.text(middle, row - 0.42, str(batch), ha="center", va="bottom", fontsize=8, color=style.QUIET)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.set_ylim(len(shown) - 0.5, -0.7)
    axes.set_xlabel("milliseconds", fontsize=9, color=style.QUIET)
    style.plain(axes, "x")
    kinds = {span.kind for _, batches in shown for _, spans in batches for span in spans}
    handles = [Patch(color=color, label=label) for kind, (color, label) in _KINDS.items() if kind in kinds]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=9, labelcolor=style.INK)
    left_out = f"; {len(rows) - len(shown)} more processes" if len(rows) > len(shown) else ""
    return style.write(figure, path, title, f"batches by number, as the host's clock saw them{left_out}")


def _bar(axes: Any, row: int, span: Span, first: float) -> None:
    color, _ = _KINDS[span.kind]
    start, length = 1000 * (span.start - first), 1000 * (span.end - span.start)
    axes.barh(row, length, left=start, height=0.62, color=color, linewidth=0, zorder=2)

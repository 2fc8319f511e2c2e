"""The table of times, and the bars of ``schedule.png``."""

from __future__ import annotations

import time
from types import SimpleNamespace

from matplotlib.figure import Figure

from auglocal_ext.distributed import Span, StepTimes
from auglocal_ext.training.run.schedule_picture import Shares, draw_schedule, on_common_clock, shares_table


def test_a_line_for_each_process():
    team = SimpleNamespace(stages=2, replicas=2)
    every = [Shares(5.0, 3.0, 1.0, 0.5, 0.5), *[Shares(1.0, 0.0, 0.0, 0.0, 1.0)] * 3]
    heading, first, *_, last = shares_table(team, [range(0, 3), range(3, 4)], every).splitlines()
    assert heading.split()[3:] == ["seconds", "busy", "waiting", "sending", "averaging", "images"]
    assert first.split() == ["0", "0", "0", "to", "2", "10.0", "50.0%", "30.0%", "10.0%", "5.0%", "5.0%"]
    assert last.split()[:5] == ["1", "1", "3", "2.0", "50.0%"]


def test_bars_are_where_the_clock_saw_them(tmp_path, monkeypatch):
    drawn = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (drawn.append(self), savefig(self, path)))
    batches = [
        (7, [Span("waiting", 10.0, 10.1), Span("step", 10.0, 10.4)]),
        (8, [Span("averaging", 10.6, 10.7), Span("step", 10.5, 10.8)]),
    ]
    rows = [(f"stage {k}", batches) for k in range(18)]
    path = draw_schedule(tmp_path / "schedule.png", rows, "a run")
    assert path.stat().st_size > 1000
    (axes,) = drawn[0].axes
    bars = [(round(bar.get_x()), round(bar.get_width())) for bar in axes.patches[:4]]
    assert bars == [(0, 400), (0, 100), (500, 300), (600, 100)]  # milliseconds; parts over the step they belong to
    assert len(axes.get_yticklabels()) == 16
    assert {text.get_text() for text in axes.texts} == {"7", "8"}
    assert any("2 more processes" in text.get_text() for text in drawn[0].texts)
    legend = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert legend == ["busy", "waits for features", "waits for the average of gradients"]


def test_spans_move_to_the_systems_clock():
    times = StepTimes()
    with times.step():
        pass
    ((batch, (span,)),) = on_common_clock(times)
    assert batch == 0 and abs(span.end - time.time()) < 5

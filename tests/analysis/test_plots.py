"""Figures show the numbers they are given, and stay readable with 55 layers and a dozen runs."""

from __future__ import annotations

import math

import pytest
import torch
from PIL import Image

from auglocal_ext.analysis import CKA, Curves, Information, LayerInformation, LayerProbe, ModuleScore, plots
from auglocal_ext.analysis.tables import Table, aligned, layer_table, thinned

SHORT = ("stem", "layer1_0", "layer2_0", "layer3_0", "classifier")
LONG = ("stem", *(f"layer{stage}_{block}" for stage in (1, 2, 3) for block in range(18)), "classifier")
MANY = tuple(f"resnet110-auglocal-d{depth}" for depth in range(12))


@pytest.fixture
def figures(monkeypatch):
    """The figures that were written, and so have their parts in place."""
    found = []
    write = plots.style.write

    def kept(figure, *arguments):
        found.append(figure)
        return write(figure, *arguments)

    monkeypatch.setattr(plots.style, "write", kept)
    return found


def similarity(names_a, names_b=None):
    names_b = names_b or names_a
    rows, columns = torch.arange(len(names_a)).double(), torch.arange(len(names_b)).double()
    return CKA(names_a, names_b, torch.exp(-((rows[:, None] - columns) ** 2) / 100), 2000)


def probes(names, start=0.4):
    return [LayerProbe(name, 64, 0.9, start + 0.01 * i, 1.0) for i, name in enumerate(names)]


def knowledge(names):
    layers = [LayerInformation(name, 0.6, 0.1 - 0.001 * i, 0.03 * i, 0.5) for i, name in enumerate(names)]
    return Information(2.303, 0.69, 0.55, layers)


def curves(modules, epochs=20, silent=()):
    time = torch.arange(1, epochs + 1).double()
    losses = torch.stack([2 / time + 0.01 * k for k in range(modules)], 1)
    accuracies = 1 - losses / 3
    accuracies[:, list(silent)] = math.nan
    own = losses[:, -1], 1.1 * losses[:, -1], accuracies[:, -1], 0.9 * accuracies[:, -1]
    return Curves(time, *own, losses.sum(1), losses, accuracies)


def scores(names, last):
    """A module per layer, but one for the ``last`` layers."""
    parts = [(name,) for name in names[:-last]] + [names[-last:]]
    return [ModuleScore(k, layers, 2 - 0.01 * k, 0.3 + 0.01 * k) for k, layers in enumerate(parts)]


def no_overlap(axis):
    """Labels of an axis, of those that are drawn, lie beside each other."""
    boxes = [tick.label1.get_window_extent() for tick in axis.get_major_ticks() if tick.label1.get_text()]
    assert len(boxes) > 1
    for one, two in zip(boxes, boxes[1:], strict=False):
        assert not one.overlaps(two)


def inside(figure):
    """All that is drawn lies within the picture, and titles above the charts."""
    boxes = [axes.get_tightbbox() for axes in figure.axes] + [legend.get_window_extent() for legend in figure.legends]
    texts = [text.get_window_extent() for text in figure.texts]
    for box in boxes + texts:
        assert box.x0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y0 >= -1 and box.y1 <= figure.bbox.y1 + 1
    assert len(texts) == 2 and all(box.y1 <= texts[1].y0 for box in boxes)


@pytest.mark.parametrize(("names_a", "names_b"), [(SHORT, SHORT), (LONG, LONG), (SHORT, LONG)])
def test_heat_map(tmp_path, figures, names_a, names_b):
    cka = similarity(names_a, names_b)
    path = plots.draw_cka(tmp_path / "new" / "cka.png", cka, "ours", "theirs")
    assert Image.open(path).format == "PNG"
    (figure,) = figures
    axes, bar = figure.axes
    (image,) = axes.images
    assert image.get_clim() == (0, 1) and image.origin == "lower"
    assert torch.equal(torch.tensor(image.get_array().filled()), cka.matrix)
    for axis, names in ((axes.xaxis, names_b), (axes.yaxis, names_a)):
        labels = [label.get_text() for label in axis.get_ticklabels()]
        assert labels[0] == "stem" and labels[-1] == "classifier"
        assert labels == [names[round(place)] for place in axis.get_ticklocs()]
        no_overlap(axis)
    assert "ours" in axes.get_ylabel() and "theirs" in axes.get_xlabel()
    assert bar.get_ylabel() == "linear CKA"
    inside(figure)


@pytest.mark.parametrize(("names", "runs"), [(SHORT, ("bp", "greedy")), (LONG, MANY)])
@pytest.mark.parametrize("kind", ["matched", "probes", "information", "modules"])
def test_lines_over_layers(tmp_path, figures, names, runs, kind):
    path = tmp_path / "lines.png"
    if kind == "matched":
        plots.draw_matched(path, {run: similarity(names) for run in runs}, "bp")
        expected = [[1.0] * len(names)]
    elif kind == "probes":
        plots.draw_probes(path, {run: probes(names) for run in runs})
        expected = [[40.0 + i for i in range(len(names))]]
    elif kind == "information":
        plots.draw_information(path, {run: knowledge(names) for run in runs})
        layers = range(len(names))
        expected = [[0.1 - 0.001 * i for i in layers], [0.03 * i for i in layers], [50.0] * len(names)]
    else:
        plots.draw_modules(path, {run: scores(names, last=3) for run in runs})
        expected = [[2 - 0.01 * k for k in range(len(names) - 2)], [30.0 + k for k in range(len(names) - 2)]]
    assert path.is_file()
    (figure,) = figures
    assert len(figure.axes) == len(expected)
    for axes, values in zip(figure.axes, expected, strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        for run in runs:
            assert lines[run].get_ydata() == pytest.approx(values)
        assert len({(lines[run].get_color(), lines[run].get_linestyle()) for run in runs}) == len(runs)
        assert axes.get_xticklabels()[-1].get_text() == "classifier"
        no_overlap(axes.xaxis)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(runs)
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    inside(figure)


def test_a_module_is_at_its_last_layer_and_one_without_classifier_is_left_out(tmp_path, figures):
    local = scores(SHORT, last=3)
    local[1] = ModuleScore(1, local[1].layers, 1.5, math.nan)
    whole = [ModuleScore(0, SHORT, 1.0, 0.9)]
    plots.draw_modules(tmp_path / "modules.png", {"local": local, "bp": whole})
    loss, accuracy = figures[0].axes
    at = {line.get_label(): list(line.get_xdata()) for line in loss.lines}
    assert at == {"local": [0, 1, 4], "bp": [4]}
    assert list(accuracy.lines[0].get_xdata()) == [0, 4]


def test_networks_of_different_layers_are_counted(tmp_path, figures):
    plots.draw_probes(tmp_path / "probes.png", {"deep": probes(LONG), "flat": probes(SHORT)})
    (axes,) = figures[0].axes
    assert axes.get_xlabel() == "layer"
    assert all(label.get_text().lstrip("−").isdigit() for label in axes.get_xticklabels())


def test_limits_are_drawn_and_seen(tmp_path, figures):
    plots.draw_information(tmp_path / "information.png", {"bp": knowledge(SHORT), "greedy": knowledge(SHORT)})
    *charts, _ = figures[0].axes
    for axes, limit in zip(charts, (0.69 - 0.55, 2.303), strict=True):
        (line,) = [line for line in axes.lines if line.get_label().startswith("_")]
        assert line.get_ydata()[0] == pytest.approx(limit, abs=1e-3)
        assert axes.get_ylim()[1] > limit
        assert not [text for text in axes.texts if "cut off" in text.get_text()]


def test_an_over_confident_probe_does_not_flatten_the_others(tmp_path, figures):
    sure = Information(2.303, 0.69, 0.55, [LayerInformation(name, 0.6, 0.1, -80.0, 0.1) for name in SHORT])
    plots.draw_information(tmp_path / "information.png", {"bp": knowledge(SHORT), "sure": sure})
    _, label, _ = figures[0].axes
    assert label.get_ylim()[0] == pytest.approx(-2.303 / 4)
    assert "cut off" in label.texts[0].get_text()


@pytest.mark.parametrize("modules", [1, 4, 50])
def test_curves(tmp_path, figures, modules):
    runs = {"first": curves(modules), "second": curves(modules, silent=[0] if modules > 1 else [])}
    plots.draw_curves(tmp_path / "curves.png", runs)
    (figure,) = figures
    charts = [axes for axes in figure.axes if axes.get_xlabel() == "epoch"]
    assert len(charts) == 4
    for (loss, accuracy), curve in zip((charts[:2], charts[2:]), runs.values(), strict=True):
        assert len(loss.lines) == modules and len(accuracy.lines) == modules + 1  # and the network's on test images
        for k in range(modules):
            assert loss.lines[k].get_ydata() == pytest.approx(curve.module_losses[:, k].tolist())
        assert accuracy.lines[-1].get_ydata() == pytest.approx((100 * curve.test_accuracy).tolist())
        assert len({tuple(line.get_color()) for line in loss.lines}) == modules
    assert len(figure.axes) - len(charts) == (2 if modules > 1 else 0)  # scales of the modules' colours
    inside(figure)


def test_table_grows_by_rows(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("older")
    table = Table(path, ("run", "value"))
    assert path.read_text().splitlines() == ["run,value"]
    table.add([("bp", 0.1), ("a, b", math.nan)])
    assert path.read_text().splitlines() == ["run,value", "bp,0.1", '"a, b",nan']
    with pytest.raises(ValueError, match=r"expected 2 values \(run, value\)"):
        table.add([("bp", 1, 2)])


def test_thinned():
    assert thinned(1) == [0] and thinned(20) == list(range(20))
    for count in range(1, 200):
        for most in (2, 8, 20):
            shown = thinned(count, most)
            assert shown[0] == 0 and shown[-1] == count - 1 and len(shown) <= most
            assert shown == list(range(count)) or count > most
            assert len({b - a for a, b in zip(shown, shown[1:-1], strict=False)}) <= 1  # evenly, up to the last


def test_layer_table():
    names = {"bp": SHORT[:2], "greedy": SHORT[:2], "other": SHORT[:1]}
    table = layer_table(names, {"bp": [0.5, math.nan], "greedy": [1, 0.25], "other": [0.125]})
    assert table.splitlines() == [
        "layer        bp  greedy",
        "stem      0.500   1.000",
        "layer1_0      -   0.250",
        "",
        "layer  other",
        "stem   0.125",
    ]
    assert aligned([["a", "b"], ["ccc", "dd"]]) == "a     b\nccc  dd"

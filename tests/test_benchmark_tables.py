"""Tables and figures of the documentation: what stands between markers, what is refused, and from which files."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from auglocal_ext.planning import plan_memory

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FIGURE = '<!-- figure: memory resnet110 "AugLocal d=6" peak -->'
PAGE = f"""# Title

It needs {FIGURE}0.97<!-- /figure --> GB.

<!-- table: analysis cka -->
<!-- /table -->

The marker `<!-- table: NAME -->` and

```md
<!-- figure: NAME -->
```
"""


@pytest.fixture
def tables(load_benchmark):
    return load_benchmark("tables")


@pytest.fixture
def root(tables, tmp_path):
    """A project of two pages that are as they should be."""
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "README.md").write_text("No marker.\n")
    (tmp_path / "docs" / "deep" / "page.md").write_text(tables.rewrite(PAGE))
    return tmp_path


def edit(root: Path, old: str, new: str) -> None:
    page = root / "docs" / "deep" / "page.md"
    assert page.read_text().count(old) == 1
    page.write_text(page.read_text().replace(old, new))


def peak(row: str) -> float:
    report = json.loads((RESULTS / "memory-predicted.json").read_text())
    (found,) = [line for line in report["networks"]["resnet110"] if line["name"] == row]
    return found["predicted"]["peak_bytes"]


def test_what_is_written_is_what_the_check_expects(tables, root):
    text = (root / "docs" / "deep" / "page.md").read_text()
    assert text.startswith(PAGE[: PAGE.index("<!-- /table")]) and "| `stem` | 0.89 |" in text
    assert text.endswith(PAGE[PAGE.index("<!-- /table") :])
    assert tables.main(["--check"], root) == 0
    assert tables.rewrite(text) == text


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (">0.97<", ">0.98<", f"{FIGURE} found '0.98', expected '0.97'"),
        ("| `stem` | 0.89 |", "| `stem` | 0.88 |", "<!-- table: analysis cka --> found '| `stem` | 0.88 |"),
        ("\n\n<!-- /table -->", "\n<!-- /table -->", "expected a blank line"),
    ],
)
def test_a_change_fails_the_check_and_is_undone(tables, root, capsys, old, new, told):
    page = root / "docs" / "deep" / "page.md"
    before = page.read_text()
    edit(root, old, new)
    changed = page.read_text()
    assert tables.main(["--check"], root) == 1
    assert "docs/deep/page.md:" in (said := capsys.readouterr().err) and told in said
    assert page.read_text() == changed
    assert tables.main([], root) == 0 and page.read_text() == before


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("table: analysis cka", "table: nonsense", "the table 'nonsense'; there are overview, memory"),
        ("table: analysis cka", "table: analysis", "expected cka|probes|information"),
        ("figure: memory", "figure: memories", "the figure 'memories'"),
        ("resnet110", "resnet111", "the network 'resnet111'; there are resnet32, resnet110"),
        ("AugLocal d=6", "AugLocal d=7", "the row 'AugLocal d=7'"),
        (" peak -->", " host_reads -->", "the field 'host_reads'"),
        ('d=6" peak', "d=6 peak", "No closing quotation"),
        ("<!-- /table -->", "", "<!-- table: analysis cka --> is not closed"),
        ("<!-- /figure -->", "", "is not closed before <!-- table: analysis cka -->"),
        ("<!-- table: analysis cka -->", "", "<!-- /table --> closes no table"),
        ("It needs ", "", "begins a line"),
        ("It needs ", "- ", "begins a line"),
        ("<!-- table: analysis cka -->", "See <!-- table: analysis cka -->", "shares its line"),
    ],
)
def test_a_marker_that_is_not_understood_is_named(tables, root, capsys, old, new, told):
    edit(root, old, new)
    before = (root / "docs" / "deep" / "page.md").read_text()
    for arguments in (["--check"], []):
        assert tables.main(arguments, root) == 1
        said = capsys.readouterr().err
        assert said.startswith("docs/deep/page.md:") and told in said
    assert (root / "docs" / "deep" / "page.md").read_text() == before


def test_figures_come_from_the_result_files(tables):
    ours, backpropagation = peak("AugLocal d=6"), peak("BP")
    figures = {
        'memory resnet110 "AugLocal d=6" peak': f"{ours / 1e9:.2f}",
        'memory resnet110 "AugLocal d=6" share': f"{100 * ours / backpropagation:.0f}",
        'memory resnet110 "AugLocal d=6" times': f"{backpropagation / ours:.1f}",
        "memory resnet110 BP flops bf16": "1.00",
        'step resnet32 "AugLocal d=6 bf16" host_reads': "1",
        'depth 1202 "BP bf16" times': "1.0",
        "command memory": "`python benchmarks/memory.py`",
    }
    for name, text in figures.items():
        (region,) = tables.regions(f"a <!-- figure: {name} -->{text}<!-- /figure -->")
        assert region.wanted == text


def test_a_row_that_failed_gives_no_figure(tables, monkeypatch):
    results = sys.modules["_tables_results"]
    report = json.loads((RESULTS / "memory-predicted.json").read_text())
    report["networks"]["resnet110"][0]["error"] = "out of memory"
    monkeypatch.setattr(results, "read", lambda source: report)
    with pytest.raises(tables.MarkerError, match="row that failed: BP"):
        tables.rewrite("a <!-- figure: memory resnet110 BP peak -->1<!-- /figure -->")
    host = json.loads((RESULTS / "host-cpu.json").read_text())
    host["results"][0]["error"] = "RuntimeError: not built"
    monkeypatch.setattr(results, "read", lambda source: host)
    with pytest.raises(tables.MarkerError, match="row that failed: layer_norm"):
        tables.rewrite("<!-- table: kernels host -->\n<!-- /table -->")


def test_every_table_has_as_many_cells_in_each_line(tables):
    names = [
        "overview",
        "overview bf16",
        "memory resnet32 resnet110",
        "memory resnet34 resnet101 vgg13",
        "backbones",
        "localized",
        "tokens",
        "counted",
        "rules resnet32",
        "rules resnet110",
        *(
            "step",
            "depth",
            "batch",
            "kernels cpu",
            "kernels steps",
            "kernels host",
            "kernels static",
            "accuracy",
            "scale",
            "scale measured",
            "shards",
        ),
        "language",
        *(f"analysis {which}" for which in ("cka", "probes", "information")),
    ]
    assert {name.split()[0] for name in names} == set(sys.modules["_tables_markdown"].TABLES)
    for name in names:
        (region,) = tables.regions(f"<!-- table: {name} -->\n<!-- /table -->")
        lines = region.wanted.strip().splitlines()
        assert len(lines) > 3 and len({line.count("|") for line in lines}) == 1, name
    assert len(tables.rewrite("<!-- table: overview -->\n<!-- /table -->").strip().splitlines()) == 2 + 6 + 4


def test_it_needs_no_torch(root):
    code = "import sys; sys.modules['torch'] = None; sys.path.insert(0, sys.argv[1]); import tables, pathlib; "
    code += "sys.exit(tables.main(['--check'], pathlib.Path(sys.argv[2])))"
    done = subprocess.run([sys.executable, "-c", code, ROOT / "benchmarks", root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_markdown_among_the_results_is_that_of_the_records_beside_it(load_benchmark):
    benchmark = load_benchmark("accuracy")
    for path in (RESULTS / "accuracy").glob("*/accuracy.json"):
        report = json.loads(path.read_text())
        assert report["tables"] == json.loads(json.dumps(benchmark.group(report["runs"]))), path
        text = path.with_suffix(".md").read_text()
        assert text == f"# Test accuracy\n\n{benchmark.describe(report['tables'])}", path
    static = json.loads((RESULTS / "kernels-static.json").read_text())
    assert (RESULTS / "kernels-static.md").read_text() == load_benchmark("static_kernels").markdown(static["rows"])


def test_the_picture_is_drawn_from_the_result_files(load_benchmark, tmp_path):
    overview = load_benchmark("overview")
    assert overview.main(["--output", str(tmp_path / "overview.png")]) == 0
    header = (tmp_path / "overview.png").read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    assert [int.from_bytes(header[at : at + 4], "big") for at in (16, 20)] == [1600, 600]


def test_stored_rows_are_called_as_today(load_benchmark):
    """The published table shows the file's labels, which name arguments of today's calls."""
    report = json.loads((RESULTS / "step-cpu.json").read_text())
    labels = {row.name: row.adds for row in load_benchmark("step").rows()}
    assert all(labels[row["name"]] == row["adds"] for rows in report["networks"].values() for row in rows)
    for call, argument in (found for adds in labels.values() for found in re.findall(r"(?:(\w+)\()?\b(\w+)=", adds)):
        assert argument in inspect.signature({"plan_memory": plan_memory}[call]).parameters

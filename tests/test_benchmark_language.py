"""benchmarks/language.py: what its runs come to, beside the paper's ablation; and that train takes its rows."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "text"
HEADER = "epoch,test_loss,test_bits_per_byte\n"


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("language")


@pytest.fixture
def report(benchmark):
    return sys.modules["_language_report"]


def write_run(folder: Path, row: str, seed: int, bits: list[float], status: str = "done") -> None:
    folder.mkdir(parents=True)
    state = {"row": row, "epochs": 2, "seed": seed, "settings": "--lr 0.1", "device": "cpu", "options": "--rule bp"}
    text = {"name": "book.txt", "bytes": 2000, "sha256": "0"}
    (folder / "run.json").write_text(
        json.dumps({**state, "data": text, "status": status, "error": None, "sittings": []})
    )
    data = {"train_tokens": 1900, "test_tokens": 100, "local_modules": 1 if row == "BP" else 2}
    (folder / "config.json").write_text(json.dumps({"data": data, "threads": 1, "versions": {}}))
    (folder / "train.txt").write_text("network  gpt: 1,234 parameters trained, 1,000\n         deployed\n")
    lines = [f"{epoch},0,{value}\n" for epoch, value in enumerate(bits, 1)]
    (folder / "log.csv").write_text(HEADER + "".join(lines))
    (folder / "samples.txt").write_text("=== epoch 1 ===\nno\n\n=== epoch 2 ===\nof ```\nline\n\n")


@pytest.fixture
def runs(tmp_path, benchmark, report):
    for seed, base in ((1, 2.0), (2, 2.2)):
        write_run(tmp_path / f"bp-{seed}", "BP", seed, [3.0, base])
        write_run(tmp_path / f"shared-{seed}", "SOLO shared", seed, [3.0, 1.1 * base])
    write_run(tmp_path / "greedy-1", "Greedy", 1, [3.5], status="interrupted")
    return report.collect(tmp_path, list(benchmark.ROWS))


def test_rows_are_means_over_seeds_beside_the_paper(runs, report):
    assert [(run["row"], run["seed"]) for run in runs] == [
        *(("BP", 1), ("BP", 2), ("Greedy", 1), ("SOLO shared", 1), ("SOLO shared", 2)),
    ]
    assert (runs[0]["parameters_trained"], runs[0]["parameters_deployed"]) == (1234, 1000)
    bp, shared = report.rows_of(runs)
    assert (bp["row"], bp["difference"], bp["paper_excess"]) == ("BP", None, None)
    assert shared["bits"]["mean"] == pytest.approx(2.31) and shared["excess"]["mean"] == pytest.approx(10)
    assert shared["difference"]["deviation"] == pytest.approx(0.02 / math.sqrt(2))
    assert shared["paper_excess"] == pytest.approx(100 * (math.log(70.62) / math.log(67.08) - 1))
    text = report.describe([bp, shared], runs)
    assert "| BP | - | 1,234 | 2 | 2.100 ± 0.141 | - | - | - |" in text
    assert "| SOLO shared | 2 | 1,234 | 2 | 2.310 ± 0.156 | +0.210 ± 0.014 | +10.00 ± 0.00 | +1.22 |" in text
    assert "- Greedy, seed 1: stopped after 1 of 2 epochs" in text and "book.txt, 2,000 bytes" in text


def test_the_picture_and_the_samples(runs, report, tmp_path):
    assert report.draw(tmp_path / "language.png", runs).stat().st_size > 10_000
    text = report.samples(runs)
    assert text.count("```") == 8 and "of '''\nline\n```" in text and "no\n" not in text and "Greedy" not in text


def test_what_is_committed_is_what_the_report_writes(benchmark, report, tmp_path):
    found = json.loads((RESULTS / "language.json").read_text())
    assert found["rows"] == json.loads(json.dumps(report.rows_of(found["runs"])))
    assert (RESULTS / "language.md").read_text() == (
        f"# Language models\n\n{report.describe(found['rows'], found['runs'])}\n"
    )
    assert (RESULTS / "samples.md").read_text(encoding="utf-8") == report.samples(found["runs"])
    page = (RESULTS.parents[2] / "docs" / "language.md").read_text(encoding="utf-8")
    (shown,) = [run["sample"] for run in found["runs"] if run["row"] == "SOLO shared" and run["seed"] == 1]
    assert f"```text\n{shown}\n```" in page


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--data FILE is missing"),
        (["--data", "none.txt"], "no such file"),
        (["--data", __file__, "--epochs", "0"], "at least 1"),
        (["--data", __file__, "--quick", "--epochs", "2"], "leave it or yours out"),
        (["--data", __file__, "--device", "gpu"], "--device is auto, cpu"),
        (["--data", __file__, "--settings", "--rule bp"], "--settings has --rule, which each run has of its own"),
    ],
)
def test_wrong_calls(benchmark, capsys, arguments, said):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_a_row_from_beginning_to_end(benchmark, tmp_path, capsys):
    words = "the of and to in he was that his it".split()
    data = tmp_path / "book.txt"
    data.write_text(" ".join(random.Random(0).choices(words, k=6000)))
    output = tmp_path / "out"
    options = ["--data", str(data), "--quick", "--rows", "SOLO random", "--output", str(output)]
    assert benchmark.main(options) == 0
    record = json.loads((output / "language.json").read_text())
    (row,), (run,) = record["rows"], record["runs"]
    assert row["row"] == "SOLO random" and row["local_modules"] == 2 and row["difference"] is None
    assert 1 < row["bits"]["mean"] < 7.9 and run["train_tokens"] == 19_000 and 0 < len(run["sample"]) <= 20
    assert {path.name for path in output.iterdir()} >= {"language.md", "language.png", "samples.md"}
    log = output / "runs" / "solo-random-seed1" / "log.csv"
    before = log.stat().st_mtime_ns
    assert benchmark.main(options) == 0  # done already
    assert log.stat().st_mtime_ns == before
    options.remove("--quick")
    explicit = ["--epochs", "1", "--bytes", str(benchmark.QUICK_BYTES), "--settings"]
    assert benchmark.main([*options, *explicit, benchmark.QUICK]) == 0  # which is --quick
    assert log.stat().st_mtime_ns == before
    text = (output / "text.txt").read_bytes()
    data.write_text("other words")
    with pytest.raises(SystemExit):
        benchmark.main([*options, *explicit, f"{benchmark.QUICK} --lr 0.5"])
    said = capsys.readouterr().err
    assert "holds a run with other settings" in said and "--lr 0.5'" in said and "data: " in said
    assert (output / "text.txt").read_bytes() == text

"""The README's example runs as written, and its commands are the ones CI runs."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.S)


def test_the_examples_run():
    first, second, third = [
        block for block in blocks("python") if block.startswith(("import torch", "from auglocal_ext"))
    ]
    names: dict = {}

    def run(example: str) -> None:
        small = example.replace("torch.randn(64,", "torch.randn(4,").replace("(64,)", "(4,)")
        exec(compile(small, "README.md", "exec"), names)

    run(first)
    assert names["logits"].shape == (4, 10)
    assert not torch.equal(names["logits"], names["out"].logits)  # after the optimizer's step
    assert names["plain"](names["x"]).shape == (4, 10)
    run(second)
    assert torch.equal(names["logits"], names["out"].logits)  # the step's own forward came first
    assert names["scheduler"].optimizer is names["step"].optimizer
    run(third)
    assert names["similarity"].shape == (17, 17) and names["probe"].name == "classifier"


def test_ci_runs_the_commands_as_written():
    commands = [line.split("#")[0].strip() for block in blocks("bash") for line in block.splitlines()]
    assert "pip install . && python benchmarks/memory.py" in commands
    assert "pip install '.[test]' && pytest" in commands
    script = (ROOT / ".ci" / "run").read_text()
    assert "pip install -q '.[test]' && pytest" in script


def test_figures_are_those_of_the_result_files():
    report = json.loads((ROOT / "benchmarks" / "results" / "memory-predicted.json").read_text())
    rows = {(network, row["name"]): row for network, rows in report["networks"].items() for row in rows}
    row = r"^\| (.+?) \| ([\d.]+) \| (\d+) % \| ([\d.]+) \| (\d+) % \| ([\d.]+) / ([\d.]+) \|$"
    table = re.findall(row, README, flags=re.M)
    assert len(table) == 10
    names = {"backpropagation": "BP", "+ `fuse(net)`": "BP fused", "+ checkpointing per block": "BP checkpointing"}
    for label, peak32, share32, peak110, share110, flops32, flops110 in table:
        name = names.get(label) or re.sub(r" \(K = \d+\)", "", label).replace("d = ", "d=")
        cells = {"resnet32": (peak32, share32, flops32), "resnet110": (peak110, share110, flops110)}
        for network, (peak, share, flops) in cells.items():
            found, base = rows[network, name]["predicted"], rows[network, "BP"]["predicted"]
            assert f"{found['peak_bytes'] / 1e9:.2f}" == peak, (network, name)
            assert f"{100 * found['peak_bytes'] / base['peak_bytes']:.0f}" == share, (network, name)
            assert f"{found['flops'] / base['flops']:.2f}" == flops, (network, name)


RUNS_OF_THE_ANALYSIS = {
    "BP": "bp",
    "BP, other seed": "bp-2",
    "AugLocal d = 2": "auglocal",
    "ContSup R1E": "contsup",
    "greedy": "greedy",
}

# The row of benchmarks/memory.py --rules that a line of README's table of rules stands for.
RULE_ROWS = {
    "backpropagation": "BP",
    "`AugLocal(depth=2)`": "AugLocal d=2",
    "`AugLocal(depth=3)`": "AugLocal d=3",
    "`AugLocal(depth=6)`": "AugLocal d=6",
    '`ContSup("R0")`': "ContSup R0",
    '`ContSup("R1")`': "ContSup R1",
    '`ContSup("E")`': "ContSup E",
    '`ContSup("R1E")`': "ContSup R1E",
    "`InfoPro(first, last)`": "InfoPro softmax",
    '`InfoPro(first, last, loss="contrast")`': "InfoPro contrast",
    "`PredSim()`": "PredSim",
    "`DGL()`": "DGL mlp-sr",
    "`MAN()`": "MAN",
    "`Greedy()`": "Greedy",
    "`MAN(head=DGL())`": "MAN + DGL",
    '`ContSup("R1E", head=InfoPro(first, last))`': "ContSup R1E + InfoPro",
    '`ContSup("R1E", head=AugLocal(depth=2))`': "ContSup R1E + AugLocal d=2",
    '`InfoPro(first, last, loss="contrast", head=AugLocal(depth=2))`': "InfoPro contrast + AugLocal d=2",
}


def test_costs_of_the_rules_are_those_of_the_result_file():
    report = json.loads((ROOT / "benchmarks" / "results" / "rules" / "rules-predicted.json").read_text())
    rows = {row["name"]: row for row in report["networks"]["resnet32"]}
    assert set(rows) - {"BP fused"} == set(RULE_ROWS.values())
    base = rows["BP"]["predicted"]
    wanted = {}
    for label, name in RULE_ROWS.items():
        row, predicted = rows[name], rows[name]["predicted"]
        wanted[label] = (
            f"{row['parameters_trained'] / 1e6:.2f} / {row['parameters_deployed'] / 1e6:.2f}",
            f"{row['macs_training'] / 1e6:.1f} / {row['macs_inference'] / 1e6:.1f}",
            f"{predicted['flops'] / base['flops']:.2f}",
            f"{predicted['peak_bytes'] / 1e9:.2f} ({100 * predicted['peak_bytes'] / base['peak_bytes']:.0f} %)",
        )
    lines = README.split("| rule | a local module is trained |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {label: tuple(figures) for label, _, _, *figures in cells} == wanted


def test_step_figures_are_those_of_the_result_file():
    report = json.loads((ROOT / "benchmarks" / "results" / "step-cpu.json").read_text())
    rows = {(network, row["name"]): row for network, rows in report["networks"].items() for row in rows}
    table = re.findall(r"^\| `(.+?)` \| ([\d.]+) \| (\d+) \| ([\d.]+) \| (\d+) \|$", README, flags=re.M)
    assert len(table) == 9
    for name, peak32, operators32, peak110, operators110 in table:
        for network, peak, operators in (("resnet32", peak32, operators32), ("resnet110", peak110, operators110)):
            row = rows[network, name]
            assert row["dtype"] == "bf16" and not row["errors"]
            assert f"{row['predicted_peak_bytes'] / 1e9:.2f}" == peak, (network, name)
            assert str(row["counts"]["operators"]) == operators, (network, name)
            assert row["counts"]["host_reads"] == int(name.startswith("AugLocal")), (network, name)
    report = json.loads((ROOT / "benchmarks" / "results" / "step-cpu-scaling.json").read_text())
    peaks = {(p["over"], p["at"], p["name"]): p["predicted_peak_bytes"] for p in report["scaling"]}
    figures = re.findall(r"([\d.]+) and ([\d.]+) GB \(`(.+?)`\)", README)
    assert len(figures) == 3
    for shallow, deep, name in figures:
        for depth, figure in ((20, shallow), (1202, deep)):
            assert f"{peaks['depth', depth, name] / 1e9:.2f}" == figure, (depth, name)
    (activations,) = re.findall(r"activations are ([\d.]+) GB at both depths", README)
    for point in report["scaling"]:
        if point["name"] == "AugLocal d=2 graph" and point["over"] == "depth":
            assert f"{point['predicted_categories']['activations and other'] / 1e9:.2f}" == activations


def test_accuracies_are_those_of_the_result_files(load_benchmark):
    benchmark = load_benchmark("accuracy")
    results = sorted((ROOT / "benchmarks" / "results" / "accuracy").glob("*/accuracy.json"))
    assert results
    for path in results:
        report = json.loads(path.read_text())
        assert report["tables"] == json.loads(json.dumps(benchmark.group(report["runs"]))), path
        text = path.with_suffix(".md").read_text()
        assert text == f"# Test accuracy\n\n{benchmark.describe(report['tables'])}", path
        for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
            assert table in README, f"README has not the table of {path}"


def test_figures_of_the_analysis_are_those_of_the_result_files():
    folder = ROOT / "benchmarks" / "results" / "analysis"

    def read(name: str) -> dict[tuple[str, str], dict[str, str]]:
        with (folder / name).open(newline="") as file:
            rows = list(csv.DictReader(file))
        return {
            (row["run"], row["layer"]): row for row in rows if row["layer"] == row.get("reference_layer", row["layer"])
        }

    similar, probes, told = read("cka.csv"), read("probes/probes.csv"), read("information.csv")
    lines = README.split("| layer | ")[1].split("\n\n")[0].splitlines()
    runs = [name.strip() for name in lines[0].strip("|").split("|")]
    assert len(runs) == 5 and len(lines) == 2 + 5
    for line in lines[2:]:
        layer, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        for run, cell in zip(runs, cells, strict=True):
            at = (RUNS_OF_THE_ANALYSIS[run], layer)
            wanted = f"{float(similar[at]['cka']):.2f} / {100 * float(probes[at]['test_accuracy']):.1f}"
            assert cell == f"{wanted} / {float(told[at]['image_information']):.3f}", (run, layer)
    for picture in re.findall(r"\(benchmarks/results/analysis/(.+?)\)", README):
        assert (folder / picture).is_file()


def test_times_of_the_cpu_provider_are_those_of_the_result_file():
    report = json.loads((ROOT / "benchmarks" / "results" / "kernels-cpu.json").read_text())
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for line in report["results"]:
        assert not line["error"], line
        times.setdefault((line["op"], line["shape"], line["dtype"]), {})[line["variant"]] = line["time"]["median"]
    ratios: dict[str, list[float]] = {}
    for (op, *_), found in times.items():
        ratios.setdefault(op, []).append(found["cpu"] / found["eager"])
    (text,) = re.findall(r"`benchmarks/results/kernels-cpu.json`\): (.+)\.$", README, flags=re.M)
    said = {op: (low, high) for op, low, high in re.findall(r"`(\w+)` ([\d.]+) to ([\d.]+)", text)}
    assert said == {op: (f"{min(found):.1f}", f"{max(found):.1f}") for op, found in ratios.items()}

"""``benchmarks/memory.py`` at a tiny size: table, JSON, picture, and rows that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ADDED = ("gradients", "activations and other")
SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "memory.py"


@pytest.fixture
def benchmark(load_benchmark):
    return load_benchmark("memory")


def test_table_json_and_picture(benchmark, tmp_path, capsys):
    arguments = ["--network", "resnet8", "--batch", "8", "--device", "cpu", "--output", str(tmp_path)]
    arguments += ["--rows", "BP", "d=2", "d=6", "R0", "R1E"]
    assert benchmark.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "predicted, tensor bytes under fake tensors, no library workspace" in printed
    assert "peak GB" in printed and "ContSup R1E" in printed
    assert "depth <= 3" in printed  # what AugLocal says about d=6 on four layers; the other rows go on

    record = json.loads((tmp_path / "memory-predicted.json").read_text())
    assert record["kind"] == "predicted"
    assert record["settings"] == {"batch": 8, "dtype": "fp32", "optimizer": record["settings"]["optimizer"]}
    assert record["versions"]["torch"] == torch.__version__
    rows = {row["name"]: row for row in record["networks"]["resnet8"]}
    assert rows["BP"]["predicted"]["peak_bytes"] > rows["ContSup R0"]["predicted"]["peak_bytes"]
    assert rows["BP checkpointing"]["predicted"]["flops"] > rows["BP"]["predicted"]["flops"]
    assert rows["BP"]["paper_gb"] is None  # the paper's figures are for its own batch and networks
    assert rows["AugLocal d=6"]["error"].startswith("ValueError") and rows["AugLocal d=6"]["predicted"] is None
    assert rows["AugLocal d=2"]["parameters_trained"] > rows["AugLocal d=2"]["parameters_deployed"]
    timeline = rows["BP"]["predicted"]["timeline"]
    assert max(live for _, live in timeline) == rows["BP"]["predicted"]["peak_bytes"]
    assert (tmp_path / "memory-predicted.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_rules_with_their_arithmetic(benchmark, tmp_path, capsys):
    arguments = ["--rules", "--network", "resnet8", "--batch", "8", "--device", "cpu", "--output", str(tmp_path)]
    assert benchmark.main([*arguments, "--rows", "BP", "Greedy", "InfoPro softmax", "MAN", "R1E", "d=2"]) == 0
    printed = capsys.readouterr().out
    assert "inference MMAC  training MMAC" in printed
    assert "known of resnet32, resnet110" in printed  # InfoPro has no weights for this network; the other rows go on
    assert (tmp_path / "rules-predicted.png").is_file() and not (tmp_path / "memory-predicted.json").exists()

    record = json.loads((tmp_path / "rules-predicted.json").read_text())
    rows = {row["name"]: row for row in record["networks"]["resnet8"]}
    assert rows["InfoPro softmax"]["error"].startswith("ValueError")
    bp, greedy, man, contsup = (rows[name] for name in ("BP", "Greedy", "MAN", "ContSup R1E"))
    assert bp["macs_inference"] == bp["macs_training"] == greedy["macs_inference"] == man["macs_inference"]
    assert greedy["macs_training"] == bp["macs_training"] + 10 * (16 + 16 + 32)  # linear classifiers of three modules
    assert man["macs_training"] > 2 * bp["macs_training"]  # each next block runs twice more
    assert contsup["macs_inference"] > bp["macs_inference"] and contsup["macs_training"] > contsup["macs_inference"]
    assert all(row["predicted"]["peak_bytes"] for row in rows.values() if not row["error"])


def test_every_rule_has_a_row(benchmark):
    import auglocal_ext

    exported = [getattr(auglocal_ext, name) for name in auglocal_ext.__all__]
    rules = {c for c in exported if isinstance(c, type) and issubclass(c, auglocal_ext.Rule)}
    classes = {c.__name__ for c in rules if c.name} - {"SOLO"}  # heads have no name; SOLO's rows are of transformers
    names = [row.name for row in benchmark.rule_rows()]
    assert len(set(names)) == len(names)
    for name in classes:
        assert any(row.startswith(name) for row in names), f"{name} has no row in benchmarks/_rule_rows.py"
    assert {row.family for row in benchmark.rule_rows()} <= set(benchmark.COLORS)


@pytest.mark.slow
def test_a_network_as_it_comes(benchmark, tmp_path):
    pytest.importorskip("torchvision", exc_type=Exception, reason="needs torchvision")
    name = "torchvision:squeezenet1_1"
    arguments = ["--localized", "--network", name, "--batch", "8", "--device", "cpu", "--output", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    record = json.loads((tmp_path / "localized-predicted.json").read_text())
    rows = {row["name"]: row for row in record["networks"][name]}
    refused = [row for row in rows.values() if row["error"]]
    assert all(row["error"].startswith("ValueError: AugLocal copies layer") for row in refused)
    found = {name: row["predicted"] for name, row in rows.items() if not row["error"]}
    bp, checkpointing, plain, lean, planned, every = (
        found[name]
        for name in (
            *("BP", "BP checkpointing", "Greedy K=4", "Greedy K=4 recompute", "Greedy K=4 recompute peak"),
            "Greedy, every cut",
        )
    )
    assert checkpointing["peak_bytes"] < bp["peak_bytes"] and checkpointing["flops"] > bp["flops"]
    assert plain["peak_bytes"] < bp["peak_bytes"] and every["peak_bytes"] < bp["peak_bytes"]
    assert planned["peak_bytes"] <= min(plain["peak_bytes"], lean["peak_bytes"])
    assert plain["flops"] <= planned["flops"] < lean["flops"]  # only what lowers the peak runs twice
    assert rows["Greedy K=4"]["parameters_trained"] > rows["BP"]["parameters_trained"]
    assert rows["Greedy K=4"]["parameters_deployed"] == rows["BP"]["parameters_deployed"]
    assert {row.family for row in benchmark.localized_rows()} <= set(benchmark.COLORS)


def test_transformers_have_rows_of_their_own(benchmark, tmp_path, capsys):
    arguments = ["--network", "vit-1x64", "gpt-1x64", "--batch", "4", "--device", "cpu", "--output", str(tmp_path)]
    assert benchmark.main([*arguments, "--rows", "BP checkpointing"]) == 0
    printed = capsys.readouterr().out
    assert "batch 4 for vit-1x64, 4 for gpt-1x64, bf16, AdamW" in printed and "torch.compile" in printed
    record = json.loads((tmp_path / "tokens-predicted.json").read_text())
    assert (tmp_path / "tokens-predicted.png").is_file()
    rows = {network: {row["name"]: row for row in found} for network, found in record["networks"].items()}
    assert not [row["error"] for found in rows.values() for row in found.values() if row["error"]]
    plain = "BP checkpointing plain logits"
    assert set(rows["gpt-1x64"]) - set(rows["vit-1x64"]) == {plain}
    found = rows["gpt-1x64"]
    logits = 4 * 2048 * 32_000 * 4
    chunked = found["BP checkpointing"]["predicted"]["peak_bytes"]
    assert found[plain]["predicted"]["peak_bytes"] > chunked + logits > logits
    late = found["BP checkpointing fused"]["predicted"]["categories"]
    early = found["BP checkpointing fused, update in backward"]["predicted"]["categories"]
    assert early["gradients"] + early["activations and other"] < late["gradients"] + late["activations and other"]
    assert early["optimizer state"] == pytest.approx(late["optimizer state"], rel=0.01)


@pytest.mark.slow
def test_memory_of_transformers_by_row(benchmark):
    rows = {row.name: row for row in benchmark.token_rows(cuda=True)}
    assert {row.family for row in rows.values()} <= set(benchmark.COLORS)

    def run(network, *names):
        found = [benchmark.run_row(rows[name], network, 4, "bf16", cuda=False) for name in names]
        assert not [result.error for result in found if result.error]
        return found

    late = "Greedy K=4 recompute, update at the end"
    local = ("Greedy K=4", "Greedy K=4 recompute", "Greedy K=4 recompute peak", "Greedy K=4 eager recompute")
    bp, checkpointed, plain, lean, planned, eager, late = run("vit-4x64", "BP", "BP checkpointing", *local, late)
    assert checkpointed.peak_bytes < bp.peak_bytes and checkpointed.predicted.flops > bp.predicted.flops
    assert planned.peak_bytes <= lean.peak_bytes < plain.peak_bytes
    assert lean.step_bytes <= eager.step_bytes < checkpointed.step_bytes
    assert lean.step_bytes < late.step_bytes  # which keeps all gradients
    for network in ("vit-2x64", "gpt-2x64"):
        solo, auglocal = run(network, "SOLO K=2 recompute peak", "AugLocal d=2 K=L recompute peak")
        assert min(solo.parameters, auglocal.parameters) > solo.deployed == auglocal.deployed
    refused = benchmark.run_row(rows["Greedy K=2"], "vit-3x64", 4, "bf16", cuda=False)
    assert "cannot have equal numbers of 3 blocks" in refused.error


def test_rows_of_transformers_train_alike(benchmark, monkeypatch):
    """Chunked or plain, checkpointed or not, updated late or in the backward pass: one step, the same weights."""
    networks = sys.modules["_token_networks"]
    monkeypatch.setattr(networks, "VOCABULARY", 11)
    monkeypatch.setattr(networks, "CONTEXT", 6)
    weights = {}
    for row in benchmark.token_rows(cuda=False):
        if row.family in ("BP", "checkpointing"):
            torch.manual_seed(0)
            step, (net, *_) = row.build_step("gpt-2x64", 3, "fp32")
            before = net[-1].weight.detach().clone()
            step(lambda label: None)
            assert not torch.equal(net[-1].weight, before)
            weights[row.name] = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert len(weights) == 7
    for name, found in weights.items():
        # AdamW's first step is the sign of the gradient, where it is not near zero
        assert ((found - weights["BP"]).abs() > 1e-5).float().mean() < 1e-3, name


def test_pure_bf16_halves_what_stays(benchmark):
    row = next(row for row in benchmark.token_rows(cuda=False) if row.name == "BP")
    found = {d: benchmark.run_row(row, "vit-1x64", 4, d, cuda=False) for d in ("bf16", "pure-bf16")}
    for category in ("parameters", "optimizer state", "inputs"):
        half, whole = (found[d].predicted.categories[category] for d in ("pure-bf16", "bf16"))
        assert 0.5 * whole <= half < 0.55 * whole, category
    assert found["bf16"].step_bytes < found["bf16"].peak_bytes


def test_half_precision_rows_need_less(benchmark):
    peaks = {}
    for dtype in ("fp32", "bf16"):
        for row in benchmark.rows(cuda=False):
            if row.name in ("BP", "AugLocal d=2"):
                peaks[row.name, dtype] = benchmark.run_row(row, "resnet8", 256, dtype, cuda=False).peak_bytes
    assert peaks["BP", "bf16"] < 0.7 * peaks["BP", "fp32"]
    assert peaks["AugLocal d=2", "bf16"] < 0.7 * peaks["AugLocal d=2", "fp32"]


def test_papers_figures_stand_at_their_own_settings(benchmark, monkeypatch):
    monkeypatch.setattr(benchmark, "estimate_step", lambda build, flops: None)
    bp = benchmark.rows(cuda=False)[0]
    assert benchmark.run_row(bp, "resnet32", 1024, "fp32", cuda=False).paper_gb == 3.15
    assert benchmark.run_row(bp, "resnet32", 512, "fp32", cuda=False).paper_gb is None
    assert benchmark.run_row(bp, "resnet32", 1024, "bf16", cuda=False).paper_gb is None


def test_a_stopped_command_goes_on(benchmark, tmp_path, monkeypatch, capsys):
    arguments = ["--network", "resnet8", "--batch", "8", "--device", "cpu", "--output", str(tmp_path)]
    arguments += ["--rows", "fused", "R0"]
    real, ran = benchmark.run_row, []
    monkeypatch.setattr(benchmark, "draw", lambda *_: None)
    monkeypatch.setattr(benchmark, "run_row", lambda row, *a, **k: ran.append(row.name) or real(row, *a, **k))
    assert benchmark.main(arguments) == 0
    whole = capsys.readouterr().out
    file = tmp_path / "memory-predicted.json"
    record = json.loads(file.read_text())
    whole_rows = record["networks"]["resnet8"]
    record["networks"]["resnet8"] = whole_rows[:1]
    file.write_text(json.dumps(record))
    assert benchmark.main([*arguments, "--resume", "--limit", "0"]) == 130
    assert benchmark.main([*arguments, "--resume"]) == 0
    assert ran == ["BP fused", "ContSup R0", "ContSup R0"]
    assert capsys.readouterr().out.endswith(whole)  # the table of both commands is that of one
    found = json.loads(file.read_text())["networks"]["resnet8"]
    for row in (*found, *whole_rows):
        for name in ("timeline", "marks"):
            row["predicted"].pop(name)
    assert found == whole_rows
    record["networks"]["resnet8"] = [{**whole_rows[0], "error": benchmark.BEGUN, "predicted": None}]
    file.write_text(json.dumps(record))
    assert benchmark.main([*arguments, "--resume"]) == 0
    assert json.loads(file.read_text())["networks"]["resnet8"][0]["error"] == benchmark.NEVER_ENDED


TRANSFORMERS = [  # which have rows of their own
    ["--network", "vit-b16", "resnet8"],
    ["--rules", "--network", "vit-b16"],
    ["--dtype", "pure-bf16"],
]


@pytest.mark.parametrize("arguments", [["--batch", "1"], ["--rows", "nothing"], ["--network", "lenet"], *TRANSFORMERS])
def test_wrong_options_end_with_a_message(benchmark, arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    assert stop.value.code == 2
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.slow
def test_runs_from_another_folder_without_an_installed_package(tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [
        sys.executable,
        str(SCRIPT),
        "--network",
        "resnet8",
        "--batch",
        "4",
        "--rows",
        "BP",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [*command, "--output", "out"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "BP checkpointing" in done.stdout
    assert (tmp_path / "out" / "memory-predicted.png").is_file()

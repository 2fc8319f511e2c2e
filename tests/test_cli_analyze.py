"""``analyze`` on tiny runs: what it writes and prints, what it refuses before any work, and Ctrl-C."""

from __future__ import annotations

import csv
import json
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from auglocal_ext.analysis import information, linear_probes, module_scores, report, selection
from auglocal_ext.analysis.selection import Settings, select
from auglocal_ext.cli import main
from auglocal_ext.training import ImageArrays, ImageFiles, TrainConfig, Trainer, load_run
from auglocal_ext.training.data.folder import FileList

LAYERS = ["stem", "layer1_0", "layer2_0", "layer3_0", "classifier"]
RUNS = {
    "bp": {"rule": "bp"},
    "auglocal": {"rule": "auglocal", "depth": 2},
    "contsup": {"rule": "contsup", "context": "E", "modules": 2},
    "contrast": {"rule": "infopro", "loss": "contrast", "weights": (1.0, 1.0, 1.0, 1.0), "modules": 2},
}


def write_images(root, classes=("dark", "light"), size=(16, 16), train=10, test=8):
    generator = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 128, (*size, 3)) + 127 * (label % 2)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def train(data, output, **settings):
    small = {"network": "resnet8", "width": 4, "epochs": 2, "batch_size": 8, "lr": 0.05, "device": "cpu", "workers": 0}
    config = TrainConfig(**{"data": str(data), "output": str(output), **small, **settings})
    Trainer(config, bars=False, say=lambda line: None).fit()
    return output


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Four runs on 20 training and 16 test images."""
    root = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    images = write_images(root / "images")
    for name, settings in RUNS.items():
        train(images, root / "runs" / name, **settings)
    return root


@pytest.fixture
def analyze(made, tmp_path, monkeypatch):
    """``analyze("bp", "--against", ...)``: exit status; results in ``tmp_path / "out"``."""
    monkeypatch.chdir(made / "runs")

    def call(*arguments):
        return main(["analyze", *arguments, "--device", "cpu", "--output", str(tmp_path / "out")])

    return call


def rows(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def files(folder):
    return {path.name for path in folder.iterdir()}


FAST = ("--probe-epochs", "1", "--information-epochs", "1", "--probe-blocks", "1", "--batch-size", "8")


@pytest.mark.slow
def test_everything(analyze, made, tmp_path, capsys):
    assert analyze("--checkpoint", "auglocal", "contsup", "bp", "--against", "bp", "--images", "12", *FAST) == 0
    out = tmp_path / "out"
    pictures = {"cka-auglocal.png", "cka-contsup.png", "cka-bp.png", "cka-matched.png", "probes.png"}
    pictures |= {"information.png", "curves.png", "modules.png"}
    tables = {"cka.csv", "probes.csv", "information.csv", "curves.csv", "modules.csv"}
    assert files(out) == pictures | tables | {"analysis.json"}
    for name in pictures:
        assert Image.open(out / name).format == "PNG"

    cka = rows(out / "cka.csv")
    assert list(cka[0]) == ["run", "layer", "reference_layer", "cka"]
    assert [(row["run"], row["layer"], row["reference_layer"]) for row in cka] == [
        (run, layer, other) for run in ("auglocal", "contsup", "bp") for layer in LAYERS for other in LAYERS
    ]
    for row in cka:
        if row["run"] == "bp" and row["layer"] == row["reference_layer"]:
            assert float(row["cka"]) == pytest.approx(1)

    probes = rows(out / "probes.csv")
    assert list(probes[0]) == ["run", "layer", "features", "train_accuracy", "test_accuracy", "test_loss"]
    assert [row["layer"] for row in probes if row["run"] == "contsup"] == LAYERS
    run = load_run("contsup", "cpu")
    source = run.source(made / "images", batch_size=8, seed=0)
    expected = linear_probes(run.network, source, 2, run.input_shape, epochs=1, seed=0)
    found = [float(row["test_loss"]) for row in probes if row["run"] == "contsup"]
    assert found == pytest.approx([probe.test_loss for probe in expected], rel=1e-4)

    facts = rows(out / "information.csv")
    assert len(facts) == 15 and {row["label_entropy"] for row in facts} == {facts[0]["label_entropy"]}
    assert float(facts[0]["label_entropy"]) == pytest.approx(np.log(2))
    for row in facts:
        gain = float(row["blank_error"]) - float(row["reconstruction_error"])
        assert float(row["image_information"]) == pytest.approx(gain)

    augmentation = run.config.recipe_values.augmentation
    settings = (2, run.input_shape, augmentation.mean, augmentation.std)
    fresh = run.source(made / "images", batch_size=8, seed=0)  # its augmentation is drawn from the beginning
    estimate = information(run.network, fresh, *settings, epochs=1, probe_blocks=1)
    losses = [float(row["label_information"]) for row in facts if row["run"] == "contsup"]
    assert losses == pytest.approx([layer.label_information for layer in estimate.layers], rel=1e-3)

    curves = rows(out / "curves.csv")
    assert list(curves[0]) == ["run", "epoch", "module", "loss", "accuracy"]
    logged = rows(made / "runs" / "auglocal" / "log.csv")
    ours = [row for row in curves if row["run"] == "auglocal"]
    assert [row["loss"] for row in ours] == " ".join(row["module_losses"] for row in logged).split()
    assert [row["accuracy"] for row in ours] == " ".join(row["module_accuracies"] for row in logged).split()
    assert [(row["epoch"], row["module"]) for row in ours] == [(e, k) for e in "12" for k in "012"]

    modules = [row for row in rows(out / "modules.csv") if row["run"] == "contsup"]
    expected = module_scores(run.network, source.test())
    assert [row["layers"].split() for row in modules] == [list(score.layers) for score in expected]
    assert [float(row["loss"]) for row in modules] == pytest.approx([score.loss for score in expected], rel=1e-5)

    said = capsys.readouterr()
    for part in (
        "cka: contsup, 2 of 3",
        "with the same layer of bp",
        "test accuracy of a linear classifier",
        "I(h, x)",
    ):
        assert part in said.out, part
    assert "each local module" in said.out and f"see {out}" in said.out
    assert not said.err  # no bars where there is no terminal


def test_facts(analyze, tmp_path, capsys):
    assert analyze("--checkpoint", "auglocal", "--against", "bp", "--analyses", "cka", "curves") == 0
    said = capsys.readouterr().out
    assert re.search(r"^run +module +last layer +training loss +accuracy +test loss +accuracy$", said, flags=re.M)
    assert re.search(r"^auglocal +0 +stem +\d\.\d{3} +[\d.]+% +\d\.\d{3} +[\d.]+%$", said, flags=re.M)
    assert files(tmp_path / "out") == {
        "analysis.json", "cka.csv", "cka-auglocal.png", "cka-matched.png", "curves.csv", "curves.png", "modules.csv",
        "modules.png",
    }  # fmt: skip
    facts = json.loads((tmp_path / "out" / "analysis.json").read_text())
    words = (
        "python -m auglocal_ext analyze --checkpoint auglocal --against bp --analyses cka curves --device cpu --output"
    )
    assert facts["command"].startswith(words)
    assert facts["settings"]["images"] == 16  # all there are
    assert set(facts["protocol"]) == {"cka", "curves"}
    assert "unbiased" in facts["protocol"]["cka"] and "Args" not in facts["protocol"]["cka"]
    assert list(facts["runs"]) == ["auglocal"] and list(facts["against"]) == ["bp"]
    assert facts["runs"]["auglocal"]["settings"]["depth"] == 2 and facts["runs"]["auglocal"]["epochs"] == 2
    assert facts["images"] == {"auglocal": {"train": 20, "test": 16}}
    assert facts["versions"].keys() >= {"auglocal_ext", "python", "torch", "numpy"}
    assert facts["machine"]["threads"] == torch.get_num_threads()


def test_each_run_with_itself(analyze, tmp_path, capsys):
    assert analyze("--checkpoint", "bp", "contrast", "--analyses", "cka", "curves") == 0
    assert "cka-matched.png" not in files(tmp_path / "out")
    table = rows(tmp_path / "out" / "cka.csv")
    matrix = torch.tensor([float(row["cka"]) for row in table]).view(2, 5, 5)
    torch.testing.assert_close(matrix, matrix.transpose(1, 2))
    torch.testing.assert_close(matrix.diagonal(dim1=1, dim2=2), torch.ones(2, 5))
    first, last = (row["accuracy"] for row in rows(tmp_path / "out" / "modules.csv") if row["run"] == "contrast")
    assert first == "nan" and 0 <= float(last) <= 1
    assert "with the classifier of its own network" in capsys.readouterr().out


def test_networks_of_different_depth_and_runs_of_one_name(analyze, made, tmp_path, capsys):
    other = train(made / "images", tmp_path / "runs" / "bp", rule="bp", network="resnet20", epochs=1)
    assert analyze("--checkpoint", str(other), "auglocal", "--against", "bp", "--analyses", "cka") == 0
    table = rows(tmp_path / "out" / "cka.csv")
    assert {row["run"]: len([r for r in table if r["run"] == row["run"]]) for row in table} == {
        "bp": 55,
        "auglocal": 25,
    }
    said = capsys.readouterr().out
    assert "auglocal, 2 of 2" in said and f"with the same layer of {made.name}/runs/bp" in said
    assert f"with the classifier of {made.name}/runs/bp" in said  # of the deeper network
    shutil.rmtree(tmp_path / "out")
    assert analyze("--checkpoint", str(other), "bp", "--analyses", "curves") == 0
    names = {row["run"] for row in rows(tmp_path / "out" / "curves.csv")}
    assert len(names) == 2 and all(name.endswith("/runs/bp") for name in names)


def test_moved_data_and_fewer_training_images(analyze, made, tmp_path, monkeypatch):
    moved = tmp_path / "moved"
    shutil.copytree(made / "images", moved)
    read = []
    load = selection.SavedRun.images
    monkeypatch.setattr(
        selection.SavedRun, "images", lambda self, *arguments: read.append(arguments) or load(self, *arguments)
    )
    arguments = ("--checkpoint", "bp", "greedy", "--data", str(moved), "--train-images", "12")
    shutil.copytree(made / "runs" / "bp", made / "runs" / "greedy", dirs_exist_ok=True)
    assert analyze(*arguments, "--analyses", "probes", *FAST[:2]) == 0
    assert len(read) == 1 and read[0][0] == str(moved)  # once for both
    facts = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert facts["images"]["bp"] == {"train": 12, "test": 16}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--checkpoint", "nowhere"], "nowhere: expected the folder of a run"),
        (["--checkpoint", "bp", "./bp"], "--checkpoint ./bp is given twice, as bp"),
        (["--checkpoint", "bp", "--against", "nowhere"], "nowhere: expected the folder of a run"),
        (["--checkpoint", "bp", "--against", "auglocal", "--analyses", "probes"], "--against belongs to cka"),
        (["--checkpoint", "bp", "--analyses", "cka", "--probe-epochs", "3"], "--probe-epochs belongs to probes"),
        (["--checkpoint", "bp", "--analyses", "cka", "--train-images", "8"], "belongs to probes and information"),
        (["--checkpoint", "bp", "--probe-epochs", "0"], "--probe-epochs must be at least 1, got 0"),
        (
            ["--checkpoint", "bp", "--analyses", "probes", "--probe-blocks", "2"],
            "--probe-blocks belongs to information",
        ),
        (["--checkpoint", "bp", "--images", "3"], "--images must be at least 4, got 3"),
        (["--checkpoint", "bp", "--batch-size", "3"], "--batch-size must be at least 4, got 3"),
        (["--checkpoint", "bp", "--train-images", "30"], "--train-images must be between 2 and the 20 there are"),
        (["--checkpoint", "bp", "--data", "elsewhere"], "elsewhere: no such folder"),
    ],
)
def test_what_cannot_be_is_said_before_any_work(analyze, tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(report, "cka", lambda *_, **__: pytest.fail("work has begun"))
    assert analyze(*arguments) == 1
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and said in shown.err
    assert not (tmp_path / "out").exists()


def test_runs_that_do_not_go_together(analyze, made, tmp_path, capsys):
    sizes = write_images(tmp_path / "sizes", size=(20, 20), train=4, test=4)
    three = write_images(tmp_path / "three", classes=("dark", "light", "odd"), train=4, test=4)
    larger = train(sizes, tmp_path / "larger", rule="bp", epochs=1)
    more = train(three, tmp_path / "more", rule="bp", epochs=1)
    scaled = train(made / "images", tmp_path / "scaled", rule="bp", epochs=1, mean=(127.5,) * 3, std=(127.5,) * 3)
    for other, said in (
        (larger, "trained on images of shape 3, 16, 16, .*larger on 3, 20, 20"),
        (more, "on classes dark, light, .*more on dark, light, odd"),
        (scaled, r"normalised by mean \(125.3, .* by \(127.5, .*--mean and --std"),
    ):
        assert analyze("--checkpoint", "bp", "--against", str(other)) == 1
        assert re.search(said, capsys.readouterr().err), said
    assert analyze("--checkpoint", "bp", "--data", str(three)) == 1
    assert "bp was trained on classes dark, light, this data has dark, light, odd" in capsys.readouterr().err
    (tmp_path / "more" / "log.csv").unlink()
    assert analyze("--checkpoint", str(more), "--analyses", "curves") == 1
    assert "log.csv: no such file" in capsys.readouterr().err


def test_results_are_not_written_over(analyze, tmp_path, capsys):
    assert analyze("--checkpoint", "bp", "--analyses", "curves") == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert analyze("--checkpoint", "auglocal", "--analyses", "curves") == 1
    assert "holds results: choose another --output" in capsys.readouterr().err
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_a_folder_that_cannot_be_written_is_one_line(analyze, tmp_path, capsys, monkeypatch):
    (tmp_path / "out").write_text("a file")
    assert analyze("--checkpoint", "bp", "--analyses", "curves") == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'} cannot be written: File exists\n"
    (tmp_path / "out").unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.Report, "_curves", full)
    assert analyze("--checkpoint", "bp", "--analyses", "curves") == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'out'} cannot be written: No space left on device\n"


def test_ctrl_c_loses_only_the_run_in_progress(analyze, tmp_path, capsys, monkeypatch):
    calls = []

    def interrupted(*arguments, **options):
        calls.append(None)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)
        return linear_probes(*arguments, **options)

    monkeypatch.setattr(report, "linear_probes", interrupted)
    # A shell's background job ignores Ctrl-C, and Python then has no handler.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert analyze("--checkpoint", "bp", "auglocal", "--analyses", "probes", "curves", *FAST[:2]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped; what was finished is in" in capsys.readouterr().err
    table = rows(tmp_path / "out" / "probes.csv")
    assert [row["run"] for row in table] == ["bp"] * 5
    assert files(tmp_path / "out") == {"analysis.json", "probes.csv", "probes.png"}


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["analyze", "--help"])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    for option in Settings.__dataclass_fields__:
        assert "--" + option.replace("_", "-") in said
    assert "default 30" in said and "default 10000" in said


def test_wrong_analysis_is_a_wrong_call(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["analyze", "--checkpoint", "bp", "--analyses", "colour"])
    assert stop.value.code == 2
    assert "invalid choice: 'colour'" in capsys.readouterr().err


def test_test_images_come_in_random_order(made):
    chosen = select(Settings((str(made / "runs" / "bp"),), analyses=("curves",), device="cpu", seed=3), bars=False)
    images = chosen.images["bp"]
    assert images.test_labels.tolist() != sorted(images.test_labels.tolist())
    stored = load_run(made / "runs" / "bp", "cpu").images()
    ours, theirs = (
        {(image.numpy().tobytes(), int(label)) for image, label in zip(*split, strict=True)}
        for split in ((images.test_images, images.test_labels), (stored.test_images, stored.test_labels))
    )
    assert ours == theirs
    assert torch.equal(images.train_images, stored.train_images)

    listed = FileList(tuple(f"{i}.png" for i in range(40)), torch.arange(40))
    mixed = selection._shuffled(ImageFiles("folder", ("a", "b"), listed, listed, 32), 0)
    assert mixed.train is listed and isinstance(mixed, ImageFiles) and isinstance(images, ImageArrays)
    assert mixed.test.labels.tolist() == [int(path.removesuffix(".png")) for path in mixed.test.paths] != [*range(40)]

"""Networks of torchvision and timm in the commands, in the benchmark of memory, and with masks."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from auglocal_ext import Greedy, InfoPro, LocalSequential, LocalStep, Segmentation
from auglocal_ext.cli import main
from auglocal_ext.models import network_by_name
from auglocal_ext.rules import FCNHead
from auglocal_ext.training import load_run
from auglocal_ext.training.run.networks import cut, task_of

torchvision = pytest.importorskip("torchvision", exc_type=Exception, reason="needs torchvision")

PLAN = ["plan", "--batch-size", "2", "--rule", "greedy"]
SMALL = "torchvision:squeezenet1_1"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Dark and bright images of 32 px: 8 of each class to train on, 2 to test."""
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    data = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("test", 2)):
        for name, low in (("bright", 128), ("dark", 0)):
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(low, low + 128, (32, 32, 3), dtype=np.uint8)
                image.fromarray(pixels).save(data / split / name / f"{i}.png")
    return data


def test_plan_of_a_network_of_torchvision(capsys):
    assert main([*PLAN, "--network", SMALL, "--image-size", "64", "--modules", "3"]) == 0
    out = capsys.readouterr().out
    assert "predicted" in out and len([line for line in out.splitlines() if line.strip()[:1].isdigit()]) >= 2


def test_plan_of_a_network_of_timm(capsys):
    pytest.importorskip("timm", reason="needs timm")
    assert main([*PLAN, "--network", "timm:test_vit", "--modules", "2"]) == 0
    assert "predicted" in capsys.readouterr().out


def test_names_that_are_none(capsys):
    assert main([*PLAN, "--network", "torchvision:squeezenet1_2"]) == 1
    assert "did you mean squeezenet1_" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*PLAN, "--network", "resnet33"])
    assert stop.value.code == 2 and "did you mean resnet3" in capsys.readouterr().err


def test_a_sequence_is_cut_between_its_children_and_any_other_network_by_its_forward():
    for name, kind in (("resnet8", "Sequential"), (SMALL, "SqueezeNet")):
        net = cut(network_by_name(name, 3), Greedy(), task_of(name, 3), (3, 64, 64), 2, fused=False)
        assert isinstance(net, LocalSequential) and net.num_modules == 2 and type(net.primary).__name__ == kind
    assert isinstance(task_of("torchvision:fcn_resnet50"), Segmentation) and task_of(SMALL).outputs == 1000


@pytest.mark.slow
def test_training_from_published_weights(images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    theirs = torchvision.models.squeezenet1_1(weights=None)
    torch.save(theirs.state_dict(), "published.pth")
    command = ["train", "--data", str(images), "--network", SMALL, "--modules", "2", "--rule", "greedy"]
    options = ["--batch-size", "8", "--device", "cpu", "--workers", "0", "--lr", "1e-9", "--seed", "3"]
    assert main([*command, *options, "--epochs", "1", "--network-weights", "published.pth"]) == 0
    folder = tmp_path / "runs" / "torchvision-squeezenet1_1-greedy"
    run = load_run(folder)
    assert run.classes == ("bright", "dark") and run.network.num_modules == 2
    first = run.network.primary.features[0].weight
    torch.testing.assert_close(first, theirs.features[0].weight, atol=1e-6, rtol=0)
    (tmp_path / "published.pth").unlink()
    load_run(folder)  # the checkpoint has the weights
    capsys.readouterr()
    assert main(["train", "--output", str(folder), "--resume", "--network", SMALL]) == 0
    stored = json.loads((folder / "config.json").read_text())["settings"]
    assert stored["network_weights"] == str(tmp_path / "published.pth")
    assert main(["train", "--output", str(folder), "--resume", "--network-weights", "other.pth"]) == 1
    assert "--network-weights" in capsys.readouterr().err
    wrong = ["--output", "other", "--network-weights", "published.pth", "--epochs", "1"]
    assert main([*command, *options, *wrong]) == 1
    assert "published.pth: no such file" in capsys.readouterr().err


def test_backpropagation_of_any_network(images, tmp_path, capsys):
    command = ["train", "--data", str(images), "--rule", "bp", "--batch-size", "8", "--device", "cpu", "--workers", "0"]
    names = ["--network", SMALL, "--output", str(tmp_path / "bp"), "--epochs", "1"]
    assert main([*command, *names]) == 0
    assert type(load_run(tmp_path / "bp").network).__name__ == "SqueezeNet"
    assert main(["analyze", "--checkpoint", str(tmp_path / "bp"), "--output", str(tmp_path / "analysis")]) == 1
    assert "train it with --rule greedy --modules 1" in capsys.readouterr().err
    names = ["--network", "torchvision:lraspp_mobilenet_v3_large", "--output", str(tmp_path / "masks")]
    assert main([*command, *names, "--epochs", "1"]) == 1
    assert "puts out a class for every pixel, but the data has one class per image" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:test_resnet", "timm:test_vit"])
def test_memory_of_networks_by_name(load_benchmark, tmp_path, name):
    if name.startswith("timm"):
        pytest.importorskip("timm", reason="needs timm")
    memory = load_benchmark("memory")
    options = ["--network", name, "--batch", "4", "--device", "cpu", "--output", str(tmp_path)]
    assert memory.main([*options, "--rows", "BP", "ContSup R0"]) == 0
    (found,) = json.loads((tmp_path / "memory-predicted.json").read_text())["networks"].values()
    by_name = {row["name"]: row for row in found}
    peaks = {key: row["predicted"]["peak_bytes"] for key, row in by_name.items() if row.get("predicted")}
    assert peaks["BP checkpointing"] < peaks["BP"]
    with pytest.raises(SystemExit):
        memory.main(["--network", "torchvision:fcn_resnet50"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large"])
@pytest.mark.parametrize("rule", [InfoPro((1, 1), (1, 1), head=FCNHead(0)), Greedy("0c2f")], ids=["infopro", "greedy"])
def test_segmentation_networks_of_torchvision(name, rule):
    """InfoPro's setting on Cityscapes: two local modules, cut inside the third stage."""
    torch.manual_seed(0)
    model = network_by_name(f"torchvision:{name}", 3)
    keys = list(model.state_dict())
    net = cut(model, rule, Segmentation(3), (3, 64, 64), 2)
    x, y = torch.rand(2, 3, 64, 64), torch.randint(0, 3, (2, 64, 64))
    y[:, :8] = 255
    net.eval()
    out = net(x, y)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(model(x)["out"], y, ignore_index=255)
    torch.testing.assert_close(out.module_losses[-1], expected)
    assert out.module_counts.shape == (2, 2, 3) and out.output.shape == (2, 3, 64, 64)
    net.train()
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.01))
    losses = [step(x, y).module_losses for _ in range(3)]
    assert losses[-1][0] < losses[0][0] and losses[-1].isfinite().all()
    assert list(model.state_dict()) == keys
    with pytest.raises(ValueError, match="compares samples by class"):
        cut(model, InfoPro((1, 1), (1, 1), loss="contrast"), Segmentation(3), (3, 64, 64), 2)

"""The scripts in examples/ run at a tiny size and do what they and docs/examples.md say."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import auglocal_ext
from auglocal_ext import AugLocal, ContSup, Greedy, LocalSequential, LocalStep, models

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """``run("own_rule", "--option", value)``: what the script defines and what it prints, from an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(name, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        capsys.readouterr()
        names = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return names, capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Dark and bright images: 32 of each class to train on, 8 to test."""
    image = pytest.importorskip("PIL.Image", reason="needs Pillow")
    pytest.importorskip("torchvision", exc_type=Exception, reason="needs torchvision")
    data = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 32), ("test", 8)):
        for name, low in (("bright", 128), ("dark", 0)):
            (data / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(low, low + 128, (32, 32, 3), generator=generator, dtype=torch.uint8)
                image.fromarray(pixels.numpy()).save(data / split / name / f"{i}.png")
    return data


def losses(out):
    return [float(found) for found in re.findall(r"loss(?:es)? ([\d.]+)", out)]


def test_every_example_is_short_and_shown():
    page = (ROOT / "docs" / "examples.md").read_text()
    shown = re.findall(r'^--8<-- "examples/(\w+)\.py"$', page, flags=re.M)
    assert sorted(shown) == sorted(path.stem for path in EXAMPLES.glob("*.py")) and len(shown) == 9
    for name in shown:
        text = (EXAMPLES / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 60 and text.startswith('"""'), name


def test_cifar10_from_a_folder(run, folder):
    options = ("--data", folder, "--network", "resnet8", "--batch-size", 16, "--workers", 0)
    _, out = run("cifar10_folder", *options, "--epochs", 3)
    found = losses(out)
    assert len(found) == 3 and found[2] < found[0]
    assert "epoch 2" in out and "test accuracy 100.00 %" in out
    saved = torch.load("cifar10.pt", weights_only=True)
    net = LocalSequential(models.resnet8(num_classes=2), AugLocal(depth=3), num_classes=2, input_shape=(3, 32, 32))
    net.load_state_dict(saved["net"])
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    step.load_state_dict(saved["step"])
    assert step.optimizer.param_groups[0]["lr"] == 0.0 and saved["scheduler"]["last_epoch"] == 3


def test_fine_tuning_torchvisions_weights(run, folder, tmp_path):
    torchvision = pytest.importorskip("torchvision", exc_type=Exception)
    theirs = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(theirs, "resnet18.pth")
    options = ("--weights", "resnet18.pth", "--size", 32, "--batch-size", 16, "--workers", 0)
    _, out = run("finetune_torchvision", "--data", folder, *options, "--epochs", 1)
    assert len(losses(out)) == 1 and "test accuracy" in out
    tuned = torch.load("finetuned.pt", weights_only=True)
    assert tuned["classifier.fc.weight"].shape == (2, 512)
    drift = (tuned["stem.conv.weight"] - theirs["conv1.weight"]).norm() / theirs["conv1.weight"].norm()
    assert 0 < drift < 0.3  # the weights it began with, and trained


def test_mixup_and_cutmix(run, folder):
    options = ("--network", "resnet8", "--batch-size", 16, "--workers", 0, "--epochs", 2)
    names, out = run("mixup_cutmix", "--data", folder, *options)
    assert len(losses(out)) == 2
    assert "auxiliary.0" in " ".join(torch.load("mixup.pt", weights_only=True))


def test_a_rule_of_ones_own(run):
    names, out = run("own_rule")
    net = names["net"]
    assert not any(p.requires_grad for p in net.auxiliary.parameters())
    first, last = ([float(x) for x in re.findall(r"[\d.]+", line.split("[")[1])] for line in out.splitlines()[::4])
    assert len(first) == 4 and all(after < before for before, after in zip(first, last, strict=True))
    with pytest.raises(ValueError, match="gain must be positive; got 0"):
        names["FixedHeads"](gain=0)
    one, two = (LocalSequential(models.resnet8(), names["FixedHeads"](gain), 10, (3, 32, 32)) for gain in (1.0, 3.0))
    assert two.auxiliary[0].head.linear.weight.std() > 2 * one.auxiliary[0].head.linear.weight.std()


def test_segmentation(run):
    names, out = run("segmentation", "--steps", 50)
    found = [float(score) for score in out.split("local module: ")[1].split()]
    background = (names["y"] == 0).sum() / (names["y"] != 255).sum() / 3  # the mIoU of a network that sees no shape
    assert len(found) == names["net"].num_modules == 3 and min(found) > 1.5 * background


@pytest.mark.slow
@pytest.mark.parametrize("runtime", [True, False], ids=["onnxruntime", "onnx"])
def test_export_to_onnx(run, monkeypatch, runtime):
    pytest.importorskip("onnxscript")
    if runtime:
        pytest.importorskip("onnxruntime")
    else:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    net = LocalSequential(models.resnet8(), ContSup("R1E"), num_classes=10, input_shape=(3, 32, 32), modules=4)
    torch.save(net.state_dict(), "net.pt")
    names, out = run("export_onnx", "--network", "resnet8", "--weights", "net.pt")
    assert torch.equal(names["net"].primary[0][0].weight, net.primary[0][0].weight)
    assert float(re.search(r"network.onnx: largest difference (\S+)", out)[1]) < 1e-5
    assert names["found"].shape == (5, 10) and bool(names["onnxruntime"]) == runtime


@pytest.fixture
def lightning():
    return pytest.importorskip("lightning")


# Three batches an epoch: Lightning resumes a plain DataLoader at an epoch's beginning alone.
LIGHTNING = ("--images", 192, "--checkpoint-every", 3)


@pytest.mark.slow
def test_lightning_counts_steps_and_resumes(run, lightning):
    names, out = run("lightning_module", *LIGHTNING, "--max-steps", 6, "--output", "straight")
    trainer = names["trainer"]
    assert trainer.global_step == 6 and trainer.fit_loop.epoch_loop.total_batch_idx == 5
    assert "6 steps, loss" in out and torch.isfinite(trainer.callback_metrics["accuracy"])
    saved = {path.name: path for path in Path("straight").rglob("*.ckpt")}
    assert {name.split("-")[1] for name in saved} == {"step=3.ckpt", "step=6.ckpt"}
    middle, end = (next(path for name, path in saved.items() if f"step={n}." in name) for n in (3, 6))
    run("lightning_module", *LIGHTNING, "--max-steps", 6, "--output", "resumed", "--resume", middle)
    (resumed,) = Path("resumed").rglob("*step=6.ckpt")
    ours, theirs = (torch.load(path, weights_only=True) for path in (resumed, end))
    assert ours["global_step"] == theirs["global_step"] == 6
    for key, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value), key
    (ours,), (theirs,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert ours["param_groups"] == theirs["param_groups"]
    assert theirs["state"] and all(
        torch.equal(ours["state"][i]["momentum_buffer"], state["momentum_buffer"])
        for i, state in theirs["state"].items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("accumulate, precision", [(2, "32-true"), (1, "bf16-mixed")])
def test_lightning_with_accumulation_and_bf16(run, lightning, accumulate, precision):
    names, _ = run("lightning_module", *LIGHTNING, "--max-steps", 1)
    learner = names["LocalLearner"](accumulate)
    trainer = lightning.Trainer(max_steps=2, precision=precision, logger=False, enable_checkpointing=False)
    loader = torch.utils.data.DataLoader(names["data"], 32)
    trainer.fit(learner, loader)
    assert trainer.global_step == 2 and trainer.fit_loop.epoch_loop.total_batch_idx + 1 == 2 * accumulate
    with pytest.raises(Exception, match="Automatic gradient clipping is not supported for manual optimization"):
        lightning.Trainer(max_steps=1, gradient_clip_val=1.0, logger=False).fit(names["LocalLearner"](), loader)


@pytest.mark.slow
def test_lightnings_automatic_optimization(run, lightning):
    """What docs/examples.md names for several processes."""
    names, _ = run("lightning_module", *LIGHTNING, "--max-steps", 1)

    class Automatic(names["LocalLearner"]):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = True

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

        def training_step(self, batch, batch_idx):
            return self.net(*batch).loss

    learner = Automatic()
    before = learner.net.auxiliary[0].head.linear.weight.clone()
    trainer = lightning.Trainer(
        max_steps=2, accumulate_grad_batches=2, gradient_clip_val=1.0, logger=False, enable_checkpointing=False
    )
    trainer.fit(learner, torch.utils.data.DataLoader(names["data"], 32))
    assert trainer.global_step == 2 and not torch.equal(learner.net.auxiliary[0].head.linear.weight, before)


@pytest.fixture
def accelerate():
    package = pytest.importorskip("accelerate")
    state = pytest.importorskip("accelerate.state")
    yield package
    state.AcceleratorState._reset_state(True)  # one for all of a process, with its mixed precision


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(run, accelerate, precision):
    names, out = run("accelerate_loop", "--images", 128, "--epochs", 2, "--mixed-precision", precision)
    assert len(losses(out)) == 2
    net, accelerator, scheduler = names["net"], names["accelerator"], names["scheduler"]
    assert scheduler.scheduler.last_epoch == 2  # two batches of each epoch make a step
    primary = torch.load("accelerate_run/primary.pt", weights_only=True)
    assert all(torch.equal(value, primary[key]) for key, value in net.primary.state_dict().items())
    before = [p.detach().clone() for p in net.parameters()]
    momenta = [state["momentum_buffer"].clone() for state in names["optimizer"].state.values()]
    names["optimizer"].state.clear()
    torch.nn.init.zeros_(net.primary[0][0].weight)
    accelerator.load_state("accelerate_run")
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    restored = [state["momentum_buffer"] for state in names["optimizer"].state.values()]
    assert all(torch.equal(a, b) for a, b in zip(momenta, restored, strict=True))
    assert (names["out"].logits.dtype == torch.float32) and accelerator.mixed_precision == precision


TWO_PROCESSES = """
import os, runpy, sys, torch
from torch.distributed.device_mesh import init_device_mesh
from auglocal_ext import LocalStep
names = runpy.run_path(sys.argv.pop(1))
accelerator, net = names["accelerator"], names["net"]
def weights():
    first, second = accelerator.gather(torch.cat([p.detach().flatten() for p in net.parameters()])[None])
    assert torch.equal(first, second)
    return first
before = weights()
assert accelerator.num_processes == 2 and names["scheduler"].scheduler.last_epoch == 4
net = accelerator.unwrap_model(net).train()
try:
    LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.1))
except RuntimeError as error:
    assert "this is one of 2 processes, and without mesh=" in str(error)
else:
    raise AssertionError("not refused")
mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("replica",))
LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.1), mesh=mesh)(*next(iter(names["loader"])))
assert not torch.equal(before, weights())
sys.stdout.flush()
os._exit(0)  # gloo's threads sometimes abort a process that tears them down on a busy machine
"""


@pytest.mark.slow
def test_accelerate_in_two_processes(accelerate, tmp_path):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "two.py"]
    options = [str(EXAMPLES / "accelerate_loop.py"), "--images", "256", "--epochs", "2"]
    source = Path(auglocal_ext.__file__).resolve().parents[1]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *options], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(losses(done.stdout)) == 2  # printed by one of the processes


def test_local_step_in_accelerate(accelerate):
    """What docs/examples.md says of autocast."""
    accelerator = accelerate.Accelerator(mixed_precision="bf16")
    net = accelerator.prepare(LocalSequential(models.resnet8(), Greedy(), num_classes=10, input_shape=(3, 32, 32)))
    step = LocalStep(net, lambda params: torch.optim.SGD(params, lr=0.1))
    x, y = torch.randn(4, 3, 32, 32), torch.randint(0, 10, (4,))
    assert step(x, y).logits.dtype == torch.float32
    with accelerator.autocast():
        assert step(x, y).logits.dtype == torch.bfloat16


@pytest.fixture
def transformers(accelerate):
    return pytest.importorskip("transformers")


@pytest.mark.slow
def test_trainer_of_hugging_face(run, transformers):
    names, out = run("hugging_face_trainer", "--images", 128, "--epochs", 2)
    trainer = names["trainer"]
    assert trainer.state.global_step == 4  # four batches an epoch, two of them make a step
    assert "eval_accuracy" in out
    straight = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    shutil.rmtree("trainer_run/checkpoint-4")
    names, _ = run("hugging_face_trainer", "--images", 128, "--epochs", 2, "--resume")
    assert names["trainer"].state.global_step == 4
    for key, value in names["trainer"].model.state_dict().items():
        assert torch.equal(value, straight[key]), key
    load = pytest.importorskip("safetensors.torch").load_file
    fresh = names["LocalClassifier"](LocalSequential(models.resnet8(), AugLocal(2), 10, (3, 32, 32)))
    fresh.load_state_dict(load("trainer_run/model/model.safetensors"))
    assert all(torch.equal(value, straight[key]) for key, value in fresh.state_dict().items())


@pytest.mark.slow
def test_what_the_trainer_of_hugging_face_cannot_do_raises(run, transformers):
    names, _ = run("hugging_face_trainer", "--images", 64, "--epochs", 1)
    data = names["random_images"](64)

    def train(**options):
        arguments = transformers.TrainingArguments("other", max_steps=1, save_strategy="no", **options)
        return transformers.Trainer(names["LocalClassifier"](names["net"]), arguments, train_dataset=data).train()

    with pytest.raises(AttributeError, match="has no attribute 'config'"):
        train(label_smoothing_factor=0.1)
    names["LocalClassifier"].config = SimpleNamespace(problem_type=None)
    with pytest.raises(ValueError, match="local losses need labels; smooth them by LocalSequential"):
        train(label_smoothing_factor=0.1)
    with pytest.raises(AttributeError, match="gradient_checkpointing_enable"):
        train(gradient_checkpointing=True)


@pytest.mark.slow
def test_trainer_of_hugging_face_in_bf16(run, transformers, accelerate):
    names, _ = run("hugging_face_trainer", "--images", 64, "--epochs", 1)
    seen = []
    names["net"].primary[0][0].register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    arguments = transformers.TrainingArguments(
        "other", max_steps=1, save_strategy="no", bf16=True, use_cpu=not torch.cuda.is_available()
    )
    model, data = names["LocalClassifier"](names["net"]), names["random_images"](64)
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert set(seen) == {torch.bfloat16}

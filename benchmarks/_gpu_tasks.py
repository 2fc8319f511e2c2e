"""The tasks of ``gpu.py``, in order of worth. Each is a line of ``results/OWED.md``, which says what is wanted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import _gpu_sanitizer
from _gpu_slices import Task

BENCHMARKS = Path(__file__).resolve().parent
MARGIN = 12.0  # seconds before its end at which a command begins nothing more
CIFAR, IMAGENET = ("resnet32", "resnet110"), ("resnet34", "resnet101", "vgg13")
TRANSFORMERS = ("vit-b16", "gpt-24x1024")
EAGER = ("eager", "cuda", "triton")


@dataclass(frozen=True)
class Place:
    """``output``: of everything; ``data``: images for accuracy; ``capability``: of the GPU, such as "9.0".

    ``dry``: tiny sizes on the CPU.
    """

    output: Path
    data: Path | None = None
    capability: str | None = None
    dry: bool = False

    @property
    def accuracy(self) -> Path:
        return self.output / "work" / "accuracy"


def tasks(place: Place) -> list[Task]:
    """All of them; commands run in their own folder, so results are written to ``.``."""
    three = ("BP", "AugLocal d=2", "AugLocal d=6")
    half_first = ("bf16", "fp32", "fp16")
    return [
        build(place),
        # Short turns, so that the first slice sees something of each.
        tests(place, "cuda", "every op by its CUDA kernels", 120),
        tests(place, "step", "LocalStep: graphs, streams, no synchronisation", 90),
        kernels(place, "kernels", "every op beside eager, no Python in a time", EAGER, half_first, seconds=120),
        step(place, "step-resnet110", "ResNet-110, rows not compiled", CIFAR[1:], "--no-compile", seconds=180),
        host_cost(place),
        *(sanitizer(place, tool) for tool in _gpu_sanitizer.TOOLS),
        tests(place, "triton", "every op by its Triton kernels", 400),
        tests(place, "rest", "what else is marked gpu", 400),
        step(place, "step-resnet32", "ResNet-32, rows not compiled", CIFAR[:1], "--no-compile"),
        memory(place, "memory", "peaks beside the predictions, fp32", CIFAR, "--no-compile"),
        accuracy(place, "accuracy-short", "do they learn in 10 epochs", 10, "resnet32", three),
        train(place),
        step(place, "step-compiled", "rows that go through torch.compile", CIFAR, "--compile", "--rows", "compile"),
        kernels(place, "kernels-compile", "torch.compile beside eager", ("eager", "compile"), half_first[:2]),
        step(place, "step-imagenet", "224 px, all rows", IMAGENET, "--compile"),
        scaling(place),
        memory(place, "rules", "every rule's peak and time", CIFAR, "--rules"),
        memory(place, "memory-bf16", "the same in bf16", CIFAR + IMAGENET, "--no-compile", "--dtype", "bf16"),
        memory(place, "memory-imagenet", "the same at 224 px", IMAGENET, "--no-compile"),
        memory(place, "memory-compile", "torch.compile and its budget", CIFAR + IMAGENET, "--rows", "compile"),
        memory(place, "memory-tokens", "transformers, with torch.compile and its budgets", TRANSFORMERS),
        tests(place, "slow", "400 steps, 10 000 replays", 500, test_seconds=480),
        tests(place, "large", "feature maps above 2^31 elements", 500, test_seconds=480),
        tests(place, "host", "the tests without a GPU, where one is", 500),
        accuracy(place, "accuracy-resnet32", "100 epochs, every row", 100, "resnet32"),
        accuracy(place, "accuracy-400", "400 epochs", 400, "resnet32", ("BP", "AugLocal d=6")),
        accuracy(place, "accuracy-resnet110", "100 epochs", 100, "resnet110", three),
        accuracy(place, "accuracy-seeds", "two more seeds", 100, "resnet32", seeds=("1235", "1236")),
        analysis(place),
    ]


def build(place: Place) -> Task:
    capability = ["--capability", place.capability] if place.capability else []
    dry = ["--no-build", "--no-run"] if place.dry else []
    site = ["--site", str(place.output / "site")]
    return Task(
        "build",
        "the libraries load, were built for this GPU, and a kernel runs",
        lambda seconds: script("_gpu_build.py", *site, "--output", ".", *capability, *dry),
        seconds=420,
        least=20,
        results={"build.json": "build.json"},
        always=True,
    )


def script(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(BENCHMARKS / name), *arguments]


def gradual(name: str, *arguments: str) -> Callable[[float], list[str]]:
    """A command that stops by itself before its time is over, and goes on when it is given again."""

    def command(seconds: float) -> list[str]:
        return script(name, *arguments, "--output", ".", "--limit", f"{max(seconds - MARGIN, 1):.0f}")

    return command


def tests(place: Place, group: str, wanted: str, seconds: float, test_seconds: float = 120) -> Task:
    arguments = [group, "--test-seconds", f"{test_seconds:g}"]
    if place.dry:  # a few of each group
        few = {"host": "test_docs.py", "step": "step/test_step_on_gpu.py", "rest": "analysis/test_cka.py"}
        few["slow"] = few["step"]
        path = BENCHMARKS.parent / "tests" / few.get(group, "ops/test_similarity_loss.py")
        arguments += ["--tests", str(path), "--may-skip-all"]
    stem = f"tests-{group}"
    return Task(
        stem,
        wanted,
        gradual("_gpu_tests.py", *arguments),
        seconds,
        resumes=True,
        results={f"{stem}.{end}": f"{stem}.{end}" for end in ("txt", "xml")},
        # With it a library that is missing fails its tests, which would be skipped.
        environment={"AUGLOCAL_FORCE_EXT": "1"} if group == "cuda" and not place.dry else {},
    )


def sanitizer(place: Place, tool: str) -> Task:
    dry = ["--collect-only"] if place.dry else []
    return Task(
        f"sanitizer-{tool}",
        f"compute-sanitizer {tool} over a few tests of the CUDA kernels",
        lambda seconds: script("_gpu_sanitizer.py", tool, "--output", ".", *dry),
        seconds=400,
        least=150,
        results={f"sanitizer-{tool}.txt": f"sanitizer-{tool}.txt"},
        missing=(lambda: None) if place.dry else _gpu_sanitizer.missing,
        environment={} if place.dry else {"AUGLOCAL_FORCE_EXT": "1"},
    )


def kernels(
    place: Place, name: str, wanted: str, variants: Sequence[str], dtypes: Sequence[str], seconds: float = 500
) -> Task:
    arguments = ["--variant", *variants, "--dtype", *dtypes, "--seconds", "0.1", "--resume"]
    if place.dry:
        arguments += ["--device", "cpu", "--quick", "--op", "supervised_contrast", "--variant", "eager", "reference"]
    results = {"kernels-c*.json": f"{name}.json"}
    return Task(name, wanted, gradual("kernels.py", *arguments), seconds, results=results, resumes=True)


def host_cost(place: Place) -> Task:
    dry = ["--device", "cpu", "--quick"] if place.dry else []
    return Task(
        "host-cost",
        "what a call of an op costs the host, beside eager layers",
        lambda seconds: script("host.py", "--output", ".", *dry),
        seconds=180,
        least=120,
        results={"host-c*.json": "host-cost.json"},
    )


def step(place: Place, name: str, wanted: str, networks: Sequence[str], *more: str, seconds: float = 500) -> Task:
    arguments = ["--network", *networks, "--part", "table", *more, "--resume"]
    if place.dry:
        arguments += ["--device", "cpu", "--network", "resnet8", "--batch", "8", "--cpu-batch", "4", "--quick"]
        arguments += ["--no-compile", "--rows", "BP checkpointing bf16", "d=2 graph"]
    results = {"step-*.json": f"{name}.json", "step-*.png": f"{name}.png"}
    return Task(name, wanted, gradual("step.py", *arguments), seconds, results=results, resumes=True)


def scaling(place: Place) -> Task:
    arguments = ["--part", "scaling", "--no-compile", "--resume"]
    if place.dry:
        arguments += ["--device", "cpu", "--batch", "8", "--cpu-batch", "4", "--quick"]
        arguments += ["--depths", "20", "--batches", "8", "--rows", "graph"]
    results = {"step-*-scaling.json": "step-scaling.json", "step-*-scaling.png": "step-scaling.png"}
    return Task(
        "step-scaling",
        "peak and time over depth and batch",
        gradual("step.py", *arguments),
        seconds=500,
        results=results,
    )


def memory(place: Place, name: str, wanted: str, networks: Sequence[str], *more: str) -> Task:
    arguments = ["--network", *networks, *more, "--resume"]
    if place.dry:
        tiny = "vit-1x64" if networks == TRANSFORMERS else "resnet8"
        arguments += ["--device", "cpu", "--network", tiny, "--batch", "8", "--rows", "BP fused"]
    stem = "rules" if "--rules" in more else "tokens" if networks == TRANSFORMERS else "memory"
    results = {f"{stem}-*.json": f"{name}.json", f"{stem}-*.png": f"{name}.png"}
    return Task(name, wanted, gradual("memory.py", *arguments), 500, results=results, resumes=True)


def train(place: Place) -> Task:
    arguments = ["--images", str(place.output / "cache" / "images"), *(["--tiny"] if place.dry else [])]
    return Task(
        "train",
        "fp16 with its scaler; how long steps wait for batches",
        gradual("_gpu_train.py", *arguments),
        seconds=400,
        resumes=True,
        results={"train.json": "train.json"},
    )


def accuracy(
    place: Place,
    name: str,
    wanted: str,
    epochs: int,
    network: str,
    rows: Sequence[str] = (),
    seeds: Sequence[str] = (),
) -> Task:
    """Runs of ``accuracy.py``, all below one folder, so that the report is one and no run is made twice."""
    arguments = ["--network", network, "--epochs", str(epochs), "--jobs", "3", "--output", str(place.accuracy)]
    arguments += ["--rows", *rows] if rows else []
    arguments += ["--seeds", *seeds] if seeds else []
    data = place.data
    if place.dry:
        data = place.data or place.output / "cache" / "images" / "8px-16"  # those of the task before
        arguments = ["--network", "resnet8", "--epochs", "1", "--rows", "BP", "--output", str(place.accuracy)]
        arguments += [
            "--device",
            "cpu",
            "--settings",
            "--width 8 --train-images 16 --batch-size 8 --lr 0.1 --workers 1",
        ]

    def command(seconds: float) -> list[str]:
        minutes = max(seconds - 2 * MARGIN, 10) / 60
        return script("accuracy.py", "--data", str(data), *arguments, "--time-limit", f"{minutes:.2f}")

    return Task(
        name,
        wanted,
        command,
        seconds=530,
        least=90,
        resumes=True,
        results={f"../accuracy/accuracy.{end}": f"accuracy.{end}" for end in ("json", "md", "png")},
        missing=lambda: None if data is not None and data.is_dir() else "needs --data DIR, a folder with CIFAR-10",
    )


def analysis(place: Place) -> Task:
    def finished() -> dict[str, Path]:
        found = {}
        for path in sorted((place.accuracy / "runs").glob("*/run.json")):
            if json.loads(path.read_text())["status"] == "done" and (path.parent / "checkpoint.pt").exists():
                found[path.parent.name] = path.parent
        return found

    def missing() -> str | None:
        bp = [name for name in finished() if "-bp-" in name]
        return None if bp else "needs finished runs of accuracy.py, backpropagation's among them"

    def command(seconds: float) -> list[str]:
        runs = finished()
        against = next(path for name, path in runs.items() if "-bp-" in name)
        given = [sys.executable, "-m", "auglocal_ext", "analyze", "--checkpoint", *map(str, runs.values())]
        few = (
            ["--device", "cpu", "--analyses", "cka", "curves", "--images", "4", "--batch-size", "4"]
            if place.dry
            else []
        )
        return [*given, "--against", str(against), "--output", ".", *few]

    names = ("cka.csv", "information.csv", "curves.csv", "modules.csv")
    return Task(
        "analysis",
        "what the layers of the accuracy runs represent",
        command,
        seconds=530,
        least=300,
        results={"analysis.json": "analysis.json", "probes/probes.csv": "probes.csv", **{name: name for name in names}},
        missing=missing,
    )

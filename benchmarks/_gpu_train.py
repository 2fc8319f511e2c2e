"""Trainings of the command on images made up here: fp16, and how long steps wait for their batches. Writes train.json.

    python benchmarks/_gpu_train.py --output DIR

Equal images cost what different ones do, so a few files stand under many names.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _environment import environment
from _resume import INTERRUPTED, earlier, write_json

LOCAL = "--rule auglocal --depth 6 --channels-last --lr 0.05"
# name -> size of the images, training images, options of train
RUNS = {
    "resident": (32, 50_000, f"--network resnet110 {LOCAL} --amp bf16 --epochs 3"),
    "fp16": (32, 50_000, f"--network resnet32 {LOCAL} --amp fp16 --epochs 3"),
    **{
        f"folder, {workers} workers": (
            224,
            30_000,
            f"--network resnet34 --rule auglocal --depth 2 --channels-last --lr 0.05 --amp bf16 --batch-size 256 "
            f"--epochs 1 --workers {workers}",
        )
        for workers in (4, 8, 16)
    },
}
TINY = {
    "resident": (8, 16, "--network resnet8 --width 8 --rule auglocal --depth 2 --epochs 1 --batch-size 8 --device cpu"),
    "folder, 1 workers": (
        8,
        16,
        "--network resnet8 --width 8 --rule auglocal --depth 2 --epochs 1 --batch-size 8 --device cpu --image-size 8 "
        "--workers 1",
    ),
}
CLASSES, DISTINCT = 10, 200
NOT_DONE, ENOUGH = "not done after", 200.0  # seconds after which a run that is not done has failed


def make_images(folder: Path, size: int, train: int, test: int) -> Path:
    """An image folder of noise with a colour for each class; left as it is if it is there."""
    import numpy as np
    from PIL import Image

    if (folder / "done").exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    draw = np.random.default_rng(0)
    for split, number in (("train", train), ("test", test)):
        files: dict[int, list[Path]] = {}
        for index in range(number):
            label, turn = index % CLASSES, index // CLASSES
            path = folder / split / f"class{label}" / f"{index:06}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            known = files.setdefault(label, [])
            if len(known) >= DISTINCT // CLASSES:
                os.link(known[turn % len(known)], path)
                continue
            tint = np.array([25 * label, 250 - 25 * label, 128])
            noise = draw.integers(-60, 60, (size // 4 + 1, size // 4 + 1, 3)).repeat(4, 0).repeat(4, 1)
            pixels = np.clip(tint + noise[:size, :size], 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(path, quality=85)
            known.append(path)
    (folder / "done").touch()
    return folder


def train(name: str, data: Path, options: str, output: Path, limit: float) -> dict[str, Any]:
    """One run; what its log says, or its last words."""
    folder = output / name.replace(", ", "-").replace(" ", "-")
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, "-m", "auglocal_ext", "train", "--data", str(data), "--output", str(folder)]
    start, result = time.monotonic(), dict[str, Any](name=name, options=options)
    try:
        done = subprocess.run(
            [*command, *options.split()], capture_output=True, text=True, timeout=None if limit == math.inf else limit
        )
    except subprocess.TimeoutExpired:
        return {**result, "error": f"{NOT_DONE} {limit:.0f} s"}
    print(done.stdout[-5000:], done.stderr[-5000:], sep="\n", flush=True)
    result["wall_seconds"] = round(time.monotonic() - start, 1)
    result["said"] = [line for line in done.stdout.splitlines() if "graph" in line]
    if done.returncode:
        return {**result, "error": (done.stderr.strip() or done.stdout.strip() or "no word").splitlines()[-1]}
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    keep = (
        "epoch",
        "train_loss",
        "local_loss_sum",
        "test_accuracy",
        "images_per_second",
        "seconds",
        "waiting",
        "peak_bytes",
    )
    result["epochs"] = [{key: float(row[key]) for key in keep} for row in rows]
    finite = all(math.isfinite(row["local_loss_sum"]) for row in result["epochs"])
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    return {**result, "error": "" if finite else "the training loss is not finite"}


def main(arguments: Sequence[str] | None = None) -> int:
    start = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="where the images are made")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no run is begun")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(arguments)
    head = {"benchmark": "train", "settings": {"tiny": options.tiny}, **environment()}
    path = options.output / "train.json"
    runs: list[dict[str, Any]] = (earlier(path, head) or {"runs": []})["runs"]
    for name, (size, number, text) in (TINY if options.tiny else RUNS).items():
        if any(run["name"] == name for run in runs):
            continue
        left = start + options.limit - time.monotonic()
        if left < 30:
            return INTERRUPTED
        data = make_images(options.images / f"{size}px-{number}", size, number, max(number // 50, CLASSES))
        left = start + options.limit - time.monotonic()
        run = train(name, data.resolve(), text, options.output.resolve(), left)
        if run["error"].startswith(NOT_DONE) and left < ENOUGH:
            return INTERRUPTED
        runs.append(run)
        write_json(path, {**head, "runs": runs})
        print(json.dumps(runs[-1], indent=1), flush=True)
    failed = [run for run in runs if run["error"]]
    for run in failed:
        print(f"{run['name']}: {run['error']}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
